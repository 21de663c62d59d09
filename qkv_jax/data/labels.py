"""What tokens are called in a picture, where a character may be spread over several of them."""

from collections.abc import Sequence


def readable(pieces: Sequence[bytes]) -> list[str]:
    """The text of each piece of a text in UTF-8; what is no whole character says so.

    A character that several pieces share is in the label of each, with the part that it has of it;
    a byte that belongs to no character is its number.

    >>> readable([b"a\\xe7", b"\\x8c", b"\\xab!", b"\\xff"])
    ['a猫·1/3', '猫·2/3', '猫·3/3!', '<FF>']
    """
    owners = [owner for owner, piece in enumerate(pieces) for _ in piece]  # of each byte
    labels, start = [""] * len(pieces), 0
    for character in b"".join(pieces).decode("utf-8", "surrogateescape"):
        end = start + len(character.encode("utf-8", "surrogateescape"))
        sharing = sorted(set(owners[start:end]))
        for part, owner in enumerate(sharing, start=1):
            if "\udc80" <= character <= "\udcff":  # a byte that Python could not decode
                labels[owner] += f"<{ord(character) - 0xDC00:02X}>"
            elif len(sharing) == 1:
                labels[owner] += character
            else:
                labels[owner] += f"{character}·{part}/{len(sharing)}"
        start = end
    return labels
