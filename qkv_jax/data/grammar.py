"""A small grammar of English and Japanese: ambiguous words, and sentences about who is where.

In a sentence with an ambiguous word two others say which of its senses is meant, each at a chosen
distance. What stands between them is the same for every sense, so nothing else tells. Each sense
also has a word that means nothing else, in the same sentences: language often says the same in two
ways, and Japanese may be written with letters that tell or with letters that do not.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Choice = TypeVar("Choice")
Pick = Callable[[Sequence[Choice]], Choice]

# Ambiguous word -> sense, the word that means nothing else -> the words that decide it, which no
# other sense has.
ENGLISH_SENSES = {
    "bank": {
        "shore": ("river", "boat", "fish", "ferry"),
        "lender": ("loan", "clerk", "coin", "cheque"),
    },
    "bat": {"mammal": ("cave", "wing", "owl", "moth"), "club": ("ball", "glove", "team", "score")},
    "spring": {
        "season": ("april", "blossom", "lamb", "winter"),
        "coil": ("steel", "mattress", "clock", "wire"),
    },
}
JAPANESE_SENSES = {
    "はし": {
        "橋": ("川", "町", "車", "船"),
        "端": ("机", "布", "床", "線"),
        "箸": ("ご飯", "皿", "茶碗", "豆"),
    },
    "くも": {"雲": ("空", "雨", "風", "雷"), "蜘蛛": ("巣", "虫", "糸", "蝶")},
    "かみ": {
        "紙": ("鉛筆", "封筒", "絵", "手紙"),
        "髪": ("櫛", "頭", "床屋", "帽子"),
        "神": ("神社", "祭", "鳥居", "願い"),
    },
}
SENSES: dict[str, dict[str, tuple[str, ...]]] = ENGLISH_SENSES | JAPANESE_SENSES
# Every sense, numbered from 0: (word, sense).
SENSE_NAMES = tuple((word, sense) for word, senses in SENSES.items() for sense in senses)

# Who -> (what they do, where): what a sentence by itself says, so that its words foretell another.
ENGLISH_HABITS = {
    "cat": (("sat", "slept"), ("mat", "rug")),
    "dog": (("lay", "barked"), ("yard", "kennel")),
    "bird": (("sang", "perched"), ("branch", "nest")),
    "child": (("played", "stood"), ("garden", "swing")),
    "cook": (("worked", "tasted"), ("kitchen", "stove")),
}
JAPANESE_HABITS = {
    "私": (("行く", "通う"), ("学校", "図書館")),
    "医者": (("急ぐ", "勤める"), ("病院", "診療所")),
    "父": (("帰る", "着く"), ("家", "駅")),
    "母": (("出かける", "寄る"), ("店", "市場")),
    "兄": (("走る", "歩く"), ("公園", "海")),
}
ENGLISH_PLACING, JAPANESE_PLACING = ("on", "under", "beside"), ("に", "へ")
ENGLISH_LINKS = ("by", "with", "near")
ENGLISH_ADJECTIVES = ("old", "new", "big", "small", "white", "quiet", "round", "good")
JAPANESE_ADJECTIVES = ("古い", "新しい", "大きい", "小さい", "白い", "静かな", "丸い", "いい")
WHERE, WHO = ("where", "どこ"), ("who", "だれ")  # questions, by language
CAT = ("the", "cat", "sat", "on", "the", "mat", ".")
WATASHI = ("私", "は", "学校", "に", "行く", "。")
# In Latin letters, for pictures on machines without a Japanese font.
LATIN = {
    "私": "watashi", "は": "wa", "学校": "gakkou", "に": "ni", "行く": "iku", "。": ".",
    "はし": "hashi", "くも": "kumo", "かみ": "kami",
}  # fmt: skip


def _kinds() -> tuple[tuple[str, ...], ...]:
    """The words, sorted: each kind may stand where another word of it does."""
    kinds = [(".", "。"), ("the",), ("?",), (*WHERE, *WHO), ("は",), ("の",), ("が",), ("ある",)]
    kinds += [ENGLISH_LINKS, ENGLISH_PLACING, JAPANESE_PLACING]
    kinds += [ENGLISH_ADJECTIVES, JAPANESE_ADJECTIVES]
    for senses in (ENGLISH_SENSES, JAPANESE_SENSES):
        kinds.append((*senses, *itertools.chain(*senses.values())))
        kinds.append(tuple(cue for of in senses.values() for cues in of.values() for cue in cues))
    for habits in (ENGLISH_HABITS, JAPANESE_HABITS):
        kinds.append(tuple(habits))
        kinds += [tuple(itertools.chain(*of)) for of in zip(*habits.values(), strict=True)]
    return tuple(kinds)


KINDS = _kinds()
WORDS = tuple(itertools.chain(*KINDS))  # the ids are their places; the first one fills rows up
IDS = {word: i for i, word in enumerate(WORDS)}


@dataclasses.dataclass(frozen=True)
class Sentence:
    """Words, and where one is ambiguous.

    Args:
        words: all of `WORDS`.
        place: of the ambiguous word; None: there is none.
        sense: that the word has, an index of `SENSE_NAMES`.
        distance: from it to the nearer of the two words that decide, in words.
    """

    words: tuple[str, ...]
    place: int | None = None
    sense: int | None = None
    distance: int | None = None


def picker(draws: Iterable[float]) -> Pick:
    """A function that picks one of several, each as likely, by the next number in [0, 1)."""
    numbers = iter(draws)
    return lambda options: options[int(next(numbers) * len(options))]


def longest_ambiguous(farthest: int) -> int:
    """The words of the longest sentence that `ambiguous_sentence` makes."""
    return 2 * farthest + 4


def ambiguous_sentence(pick: Pick, farthest: int) -> Sentence:
    """A sentence with an ambiguous word, or the word for its sense, between two that decide it.

        the river by the old quiet bank near the boat .      川 の 白い はし の 古い 船 が ある 。
        the river by the old quiet shore near the boat .     川 の 白い 橋 の 古い 船 が ある 。

    The nearer one is at most so many words away as is picked of 1 to `farthest`: mostly near, as
    words that belong together are. The other one, on the other side, is no nearer and no farther
    than `farthest`. Two in three sentences have the ambiguous word.
    """
    english = pick((True, False))
    senses = ENGLISH_SENSES if english else JAPANESE_SENSES
    word = pick(tuple(senses))
    sense = pick(tuple(senses[word]))
    said = pick((word, word, sense))
    cues = senses[word][sense]
    first = pick(cues)
    second = pick([cue for cue in cues if cue != first])
    near = pick(range(1, pick(range(1, farthest + 1)) + 1))
    far = pick(range(near, farthest + 1))
    left, right = pick(((near, far), (far, near)))
    head, tail = (("the",), (".",)) if english else ((), ("が", "ある", "。"))
    between = _english_between if english else _japanese_between
    before = (*head, first, *between(pick, left - 1))
    words = (*before, said, *between(pick, right - 1), second, *tail)
    if said == sense:
        return Sentence(words)
    return Sentence(words, len(before), SENSE_NAMES.index((word, sense)), near)


def _english_between(pick: Pick, number: int) -> tuple[str, ...]:
    """So many words that link two nouns: none, "by", "by the", "by the old", ..."""
    adjectives = (pick(ENGLISH_ADJECTIVES) for _ in range(number - 2))
    return (pick(ENGLISH_LINKS), "the", *adjectives)[:number] if number else ()


def _japanese_between(pick: Pick, number: int) -> tuple[str, ...]:
    """So many words that link two nouns: none, の, の 古い, ..."""
    return ("の", *(pick(JAPANESE_ADJECTIVES) for _ in range(number - 1)))[:number]


def plain_sentence(pick: Pick) -> Sentence:
    """Somebody who does what they do, where they do it.

    the cat sat on the mat .      私 は 学校 に 行く 。
    """
    english = pick((True, False))
    habits = ENGLISH_HABITS if english else JAPANESE_HABITS
    who = pick(tuple(habits))
    actions, places = habits[who]
    *_, words = told(pick, english, who, pick(actions), pick(places))
    return Sentence(words)


def told(
    pick: Pick, english: bool, who: str, action: str, place: str, *, adjective: bool = False
) -> tuple[range, range, tuple[str, ...]]:
    """Where in a sentence it says who and where, and its words.

    Args:
        pick: picks what links them.
        english: or Japanese.
        who, action, place: of `ENGLISH_HABITS` or `JAPANESE_HABITS`, of any key.
        adjective: whether the place has one.
    """
    adjectives = ENGLISH_ADJECTIVES if english else JAPANESE_ADJECTIVES
    described = (pick(adjectives), place) if adjective else (place,)
    if english:
        words = ("the", who, action, pick(ENGLISH_PLACING), "the", *described, ".")
        return range(0, 2), range(3, 5 + len(described)), words
    words = (who, "は", *described, pick(JAPANESE_PLACING), action, "。")
    return range(0, 1), range(2, 3 + len(described)), words
