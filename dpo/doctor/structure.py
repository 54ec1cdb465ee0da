"""Structure: pairs whose two texts are cut off, broken, in another script, or the same but for their formatting.

What stands on one side only is also a shortcut: a policy may learn the mark instead of the difference.

Shapes: N texts, L scripts and languages, F languages that are known by their words.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from dpo.doctor.check import Check
from dpo.doctor.text import Corpus, Words, share

# Shares of all rows, and of the rows with the mark on one side those where it is on the commoner one.
NOTED, WARNED, LOPSIDED = 0.05, 0.1, 0.8
# Fewer rows than this are worth no warning, whatever their share.
FEW = 20


def check_structure(corpus: Corpus, bad: Sequence[str]) -> list[Check]:
    return [
        bad_rows(bad, len(corpus)),
        formatting_only(corpus),
        barely_different(corpus),
        broken_text(corpus),
        role_marks(corpus),
        no_answer(corpus),
        scripts(corpus),
        cut_off(corpus),
        refusals(corpus),
    ]


def bad_rows(bad: Sequence[str], good: int) -> Check:
    total = good + len(bad)
    return Check(
        "bad_rows",
        "Can every row be read?",
        "ok" if not bad else "note" if len(bad) < NOTED * total else "warn",
        f"{share(len(bad), total)} cannot be used" + (f"; the first: {bad[0]}" if bad else ""),
        advice="Correct these rows, or train with on_bad_row=skip." if bad else "",
        numbers={"rows": total, "bad": len(bad)},
    )


# --- two sides that are the same, or nearly ---


def formatting_only(corpus: Corpus) -> Check:
    same = np.flatnonzero(corpus.chosen_words.counts == corpus.rejected_words.counts)
    rows = {
        row: "the two sides differ in formatting only"
        for row in same.tolist()
        if np.array_equal(corpus.chosen_words[row], corpus.rejected_words[row])
        and symbols(corpus.chosen[row]) == symbols(corpus.rejected[row])
    }
    return Check(
        "formatting_only",
        "Do the two sides differ in more than formatting?",
        _by_share(len(rows), len(corpus)),
        f"{share(len(rows), len(corpus))} differ only in markup, case, white space or punctuation",
        advice="Leave them out: the only thing to learn from them is a format." if rows else "",
        numbers={"rows": len(rows), "share": len(rows) / len(corpus)},
        rows=rows,
        drops=True,
    )


def symbols(text: str) -> str:
    """What is neither white space, punctuation nor markup: `a + b` and `a - b` are different, 👍 and 👎 too."""
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(c for c in text if unicodedata.category(c)[0] not in "ZPC" and c not in "`~|>^")


def barely_different(corpus: Corpus) -> Check:
    ratios: dict[int, float] = {}
    for row, (chosen, rejected) in enumerate(zip(corpus.chosen, corpus.rejected, strict=True)):
        ratio = edit_ratio(chosen, rejected, below=0.1)
        if ratio is not None:
            ratios[row] = ratio
    closest = sorted(ratios, key=lambda row: ratios[row])
    tiny = sum(ratio < 0.02 for ratio in ratios.values())
    return Check(
        "barely_different",
        "Is there a clear difference between the two sides?",
        "warn" if tiny >= max(NOTED * len(corpus), FEW) else _by_share(len(ratios), len(corpus)),
        f"{share(len(ratios), len(corpus))} differ in less than 10% of their characters, {tiny:,} in less than 2%",
        advice="Such pairs push the chosen response down with the rejected one: dpop_lambda guards, or leave them out."
        if ratios
        else "",
        numbers={"below_10_percent": len(ratios), "below_2_percent": tiny, "share": len(ratios) / len(corpus)},
        rows={row: f"differs in {100 * ratios[row]:.1f}% of its characters" for row in closest},
    )


def edit_ratio(a: str, b: str, *, below: float) -> float | None:
    """Levenshtein distance over the longer length; None where it is not below `below`."""
    longest = max(len(a), len(b))
    limit = below * longest
    if abs(len(a) - len(b)) >= limit:
        return None
    counts = np.zeros(256, dtype=np.int64)
    for text, sign in ((a, 1), (b, -1)):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        counts += sign * np.bincount(codes & 255, minlength=256)
    # One edit changes the counts of two characters by one at most.
    if np.abs(counts).sum() / 2 >= limit:
        return None
    distance = levenshtein(a, b)
    return distance / longest if distance < limit else None


def levenshtein(a: str, b: str) -> int:
    """How many characters must be inserted, deleted or replaced. Bit i of `up` and `down` says whether row i of the
    current column of the table is one more or one less than row i - 1 (Myers 1999, as in Hyyro 2001)."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    a, b = a[start : len(a) - end], b[start : len(b) - end]
    if not a or not b:
        return len(a) + len(b)
    places: dict[str, int] = {}
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    mask, last = (1 << len(a)) - 1, 1 << len(a) - 1
    up, down, distance = mask, 0, len(a)
    for character in b:
        equal = places.get(character, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right_up, right_down = down | ~(diagonal | up) & mask, up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up = (right_up << 1 | 1) & mask
        up = (right_down << 1 | ~(diagonal | right_up)) & mask
        down = right_up & diagonal
    return distance


# --- broken texts ---

# What UTF-8 read as Latin-1 or Windows-1252 looks like, what stands for an unreadable byte, and control characters.
BROKEN = {
    "a replacement character": re.compile("\ufffd"),
    "mojibake": re.compile("â€[™œ“”¦˜\x9d\x99\x9c]|Ã[©¨¤¶¼ª§±¡³º\xad]|Â[ \xa0°£©«»]|ï»¿"),
    "a control character": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "half a surrogate pair": re.compile("[\ud800-\udfff]"),
}
ROLE_MARKS = re.compile(
    r"<\|[\w./-]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|<[be]os>"
    r"|^(?:Human|Assistant):(?:\s|$)|^### (?:Instruction|Response|Human|Assistant):",
    re.MULTILINE,
)
# Of these every mark holds one: most texts need no search.
ROLE_MARK_HINTS = ("<|", "INST]", "SYS>>", "s>", "_turn>", "Human:", "Assistant:", "### ")
PLACEHOLDERS = {"n/a", "na", "none", "null", "nan", "undefined", "todo", "[deleted]", "[removed]", "deleted", "removed"}


def broken_text(corpus: Corpus) -> Check:
    rows: dict[int, str] = {}
    for side, texts, _ in corpus.sides:
        for row, text in enumerate(texts):
            fault = fault_of(text)
            if fault:
                rows.setdefault(row, f"{side} holds {fault}")
    prompts = sum(fault_of(text) is not None for text in corpus.question)
    return _flagged(
        "broken_text", "Are the texts well-formed?",
        "have a response with control characters, mojibake or unreadable bytes"
        + (f"; {prompts:,} prompts hold such too, and stay" if prompts else ""), rows, corpus,
        "Read the source again with its own encoding, or leave these rows out: the policy would learn to write them.",
    )  # fmt: skip


def fault_of(text: str) -> str | None:
    if text.isascii() and text.isprintable():
        return None
    found = ((name, pattern.search(text)) for name, pattern in BROKEN.items())
    return next((f"{name} at character {match.start() + 1}" for name, match in found if match), None)


def role_marks(corpus: Corpus) -> Check:
    rows: dict[int, str] = {}
    for side, texts, _ in corpus.sides:
        for row, text in enumerate(texts):
            if any(hint in text for hint in ROLE_MARK_HINTS):
                found = ROLE_MARKS.search(text)
                if found:
                    rows.setdefault(row, f"{side} holds {found[0]!r}")
    return _flagged(
        "role_marks", "Is every response one turn and no template?",
        "hold a special token or a role's name in a response", rows, corpus,
        "Leave them out, or cut them there: the policy would learn to write the other's turn too.",
    )  # fmt: skip


def no_answer(corpus: Corpus) -> Check:
    rows: dict[int, str] = {}
    for side, texts, words in corpus.sides:
        for row in np.flatnonzero(words.counts <= 2):
            text = texts[row].strip()
            if text.lower() in PLACEHOLDERS or not symbols(text):
                rows.setdefault(int(row), f"{side} is {text[:40]!r}")
    return _flagged(
        "no_answer", "Does every response say something?", "have a response without a word, or a placeholder", rows,
        corpus, "Leave them out: such a rejected response teaches nothing, such a chosen one harm.",
    )  # fmt: skip


def _flagged(name: str, question: str, what: str, rows: dict[int, str], corpus: Corpus, advice: str) -> Check:
    """A check on rows that nobody wants: any is worth a note, and they are left out."""
    return Check(
        name,
        question,
        _by_share(len(rows), len(corpus)),
        f"{share(len(rows), len(corpus))} {what}",
        advice=advice if rows else "",
        numbers={"rows": len(rows), "share": len(rows) / len(corpus)},
        rows=dict(sorted(rows.items())),
        drops=True,
    )


def _by_share(count: int, rows: int) -> str:
    return "warn" if count >= max(NOTED * rows, FEW) else "note" if count else "ok"


# --- scripts and languages ---

# First code points of the blocks of a script; what stands between belongs to the one before.
BLOCKS = [
    (0x30, "digits"), (0x41, "latin"), (0x370, "greek"), (0x400, "cyrillic"), (0x530, "armenian"), (0x590, "hebrew"),
    (0x600, "arabic"), (0x900, "indic"), (0xE00, "thai"), (0xE80, "other"), (0x10A0, "georgian"), (0x1100, "korean"),
    (0x1200, "other"), (0x1E00, "latin"), (0x1F00, "greek"), (0x2000, "other"), (0x3040, "japanese"),
    (0x3100, "chinese"), (0xA000, "other"), (0xAC00, "korean"), (0xD7B0, "other"), (0xF900, "chinese"),
    (0xFB00, "other"), (0x20000, "chinese"), (0x32000, "other"),
]  # fmt: skip
# Words that a text of some length in the language has, and the other languages have not.
FUNCTION_WORDS = {
    "English": "the of and is that it was you with this are from they have",
    "Spanish": "el los las por una del que con para como está pero más",
    "French": "le les et est dans vous nous avec cette mais pas sont aux",
    "German": "der das und ist nicht ein eine mit auf sich auch werden wird",
}
LANGUAGES = [*dict.fromkeys(name for _, name in BLOCKS), *FUNCTION_WORDS]


def languages_of(corpus: Corpus, words: Words) -> np.ndarray:
    """For each row the index in LANGUAGES of most of its words, or -1 where there are too few to tell.

    A language counts where its function words are a tenth of the text's words, and thrice those of any other.
    """
    firsts = np.array([ord(word[0]) for word in corpus.vocabulary.words] or [0])
    names = [LANGUAGES.index(name) for _, name in BLOCKS]
    script = np.array([names[0], *names])[np.searchsorted([start for start, _ in BLOCKS], firsts, side="right")]
    scripts_NL = np.bincount(words.rows * len(LANGUAGES) + script[words.flat], minlength=len(words) * len(LANGUAGES))
    scripts_NL = scripts_NL.reshape(len(words), -1)[:, : len(LANGUAGES) - len(FUNCTION_WORDS)].copy()
    scripts_NL[:, [LANGUAGES.index("digits"), LANGUAGES.index("other")]] = 0
    # A Japanese text is written in Chinese characters too.
    japanese, chinese = LANGUAGES.index("japanese"), LANGUAGES.index("chinese")
    is_japanese = scripts_NL[:, japanese] > 0.1 * scripts_NL[:, chinese]
    scripts_NL[is_japanese, japanese] += scripts_NL[is_japanese, chinese]
    scripts_NL[is_japanese, chinese] = 0
    found = scripts_NL.argmax(axis=1)
    found[scripts_NL.max(axis=1) < np.maximum(5, 0.6 * scripts_NL.sum(axis=1))] = -1

    # A language's number for each function word, 0 for all other words.
    function = np.zeros(len(corpus.vocabulary) + 1, dtype=np.int64)
    for number, text in enumerate(FUNCTION_WORDS.values(), start=1):
        function[[corpus.vocabulary.ids[w] for w in text.split() if w in corpus.vocabulary.ids]] = number
    width = len(FUNCTION_WORDS) + 1
    counts_NF = np.bincount(words.rows * width + function[words.flat], minlength=len(words) * width)
    counts_NF = counts_NF.reshape(len(words), width)[:, 1:]
    most = counts_NF.max(axis=1)
    clear = (most >= np.maximum(3, 0.1 * words.counts)) & (4 * most >= 3 * counts_NF.sum(axis=1))
    clear &= found == LANGUAGES.index("latin")
    return np.where(clear, len(LANGUAGES) - len(FUNCTION_WORDS) + counts_NF.argmax(axis=1), found)


def scripts(corpus: Corpus) -> Check:
    question, chosen, rejected = (
        languages_of(corpus, words) for words in (corpus.question_words, corpus.chosen_words, corpus.rejected_words)
    )
    sides, prompts = _differ(chosen, rejected), _differ(question, chosen) | _differ(question, rejected)
    rows = {}
    for row in np.flatnonzero(sides | prompts):
        named = {
            name: LANGUAGES[found[row]]
            for name, found in (("prompt", question), ("chosen", chosen), ("rejected", rejected))
            if found[row] >= 0
        }
        rows[int(row)] = ", ".join(f"{name} {language}" for name, language in named.items())
    rows = dict(sorted(rows.items(), key=lambda item: not sides[item[0]]))
    return Check(
        "languages",
        "Are both sides in the same language?",
        _by_share(int(sides.sum()), len(corpus)) if sides.any() else "note" if rows else "ok",
        f"{share(int(sides.sum()), len(corpus))} have two sides in different languages or scripts, "
        f"{int((prompts & ~sides).sum()):,} more answer in another than the prompt's",
        advice="Translations are fine; elsewhere leave these rows out, or the language becomes the difference."
        if rows
        else "",
        numbers={
            "sides_differ": int(sides.sum()),
            "prompt_differs": int((prompts & ~sides).sum()),
            "share": len(rows) / len(corpus),
        },
        rows=rows,
    )


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether two languages are both known and different; latin letters alone may be any of them, or code."""
    latin = LANGUAGES.index("latin")
    return (a != b) & (a >= 0) & (b >= 0) & (a != latin) & (b != latin)


# --- marks on one side ---

SENTENCE_END = ".!?…。！？\"'”’」』)]}>`*|:）】；;~"
LIST_MARK = re.compile(r"\s*(?:[-*+•#>|]+|\d+[.)、])\s*")
REFUSAL = re.compile(
    r"i(?:'|’)m sorry|i am sorry|sorry,|i apologi[sz]e|i can(?:no|'|’)t (?:help|assist|provide|do|answer|support|give)"
    r"|i cannot|(?:i(?:'|’)m|i am) (?:not able|unable)|i won(?:'|’)t|as an ai|as a language model"
    r"|抱歉|对不起|我无法|我不能|作为一个?(?:ai|人工智能|语言模型)"
)


def ends_mid_sentence(text: str) -> bool:
    """Whether the last line is a sentence without its end, or a code block is never closed.

    A line of fewer than 8 words may be an answer, an item of a list or a heading as it stands.
    """
    if text.count("```") % 2:
        return True
    text = text.rstrip()
    if not text or text[-1] in SENTENCE_END or text.endswith("```"):
        return False
    last = text[text.rfind("\n") + 1 :][-400:]
    # A number or an address may well be the end.
    if not (text[-1].isalpha() and "/" not in last.split()[-1]) and text[-1] not in ",，、-(（":
        return False
    item = LIST_MARK.match(last)
    if item:
        # An item of a list needs no full stop, unless it has sentences.
        last = last[item.end() :]
        return bool(re.search(r"[.:!?。：！？]\s*\S", last)) and len(WORD_LIKE.findall(last)) >= 8
    return len(WORD_LIKE.findall(last)) >= 8


WORD_LIKE = re.compile(r"[\u3040-\u9fff]{2}|[^\W\u3040-\u9fff]+")


def cut_off(corpus: Corpus) -> Check:
    return _one_sided(
        "cut_off", "Do responses end where a sentence ends?", "end mid-sentence", ends_mid_sentence, corpus,
        "Draw the responses again with a larger max_new_tokens, or leave out the rows where one side is cut off: "
        "otherwise the policy learns to end, and not what to say.",
    )  # fmt: skip


def is_refusal(text: str) -> bool:
    return bool(REFUSAL.search(text[:60].lower()))


def refusals(corpus: Corpus) -> Check:
    return _one_sided(
        "refusals", "Are refusals on both sides?", "begin with a refusal or an apology", is_refusal, corpus,
        "Where this is not meant, add pairs in which the other side refuses: otherwise the policy learns to refuse, or "
        "not to, whatever is asked.",
    )  # fmt: skip


def _one_sided(name: str, question: str, what: str, has, corpus: Corpus, advice: str) -> Check:
    """A check on a mark that a response has or has not: grave where it tells which side is chosen."""
    chosen, rejected = (np.array([has(text) for text in texts], dtype=bool) for _, texts, _ in corpus.sides)
    only = {"chosen": chosen & ~rejected, "rejected": rejected & ~chosen}
    one_sided = int((chosen ^ rejected).sum())
    commoner = max(only, key=lambda side: int(only[side].sum()))
    leaning = only[commoner].sum() / max(one_sided, 1)
    verdict = "ok"
    if one_sided >= max(NOTED * len(corpus), FEW):
        verdict = "warn" if one_sided >= WARNED * len(corpus) and leaning >= LOPSIDED else "note"
    summary = f"{chosen.mean():.1%} of chosen and {rejected.mean():.1%} of rejected responses {what}"
    if one_sided:
        summary += f"; of the {one_sided:,} rows with one such side it is {commoner} in {leaning:.0%}"
    return Check(
        name,
        question,
        verdict,
        summary,
        advice=advice if verdict != "ok" else "",
        numbers={
            "chosen": float(chosen.mean()),
            "rejected": float(rejected.mean()),
            "only_chosen": int(only["chosen"].sum()),
            "only_rejected": int(only["rejected"].sum()),
            "both": int((chosen & rejected).sum()),
            "share": one_sided / len(corpus),
        },
        rows={
            int(row): f"{side} alone does"
            for side in sorted(only, key=lambda side: side != commoner)
            for row in np.flatnonzero(only[side])
        },
    )
