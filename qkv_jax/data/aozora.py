"""Texts of Aozora Bunko, Japan's library of books out of copyright, without what is no text."""

import re

MISSING = "〓"  # what printers set for a character that they had no type for

_LEGEND = re.compile(r"^-{10,}\n【.*?^-{10,}\n", re.M | re.S)
_COLOPHON = re.compile(r"^底本[：:].*", re.M | re.S)
_MISSING = re.compile(r"※［＃[^］\n]*］")
_NOTE = re.compile(r"［＃[^］\n]*］")
_RUBY = re.compile(r"｜([^｜《》\n]*)《[^《》\n]*》|《[^《》\n]*》")


def aozora_text(text: str) -> str:
    """The text as it is read: without ruby, notes on the setting, the legend and the colophon.

        吾輩《わがはい》は猫である。 -> 吾輩は猫である。
        一番｜獰悪《どうあく》な種族 -> 一番獰悪な種族
        ［＃８字下げ］一［＃「一」は中見出し］ -> 一
        殷※［＃「にんべん＋鬼」、第4水準2-1-91］ -> 殷〓

    Title and author stay. A text without any of this stays as it is.
    Source: Aozora Bunko's rules of annotation, www.aozora.gr.jp/annotation/.

    Args:
        text: of a file, decoded, with "\\n" between lines.
    """
    text = _COLOPHON.sub("", _LEGEND.sub("", text))
    text = _NOTE.sub("", _MISSING.sub(MISSING, text))
    return _RUBY.sub(lambda match: match[1] or "", text)
