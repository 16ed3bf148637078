"""Words of free texts, in scripts with and without spaces."""

import re

_RUN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SPACELESS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese characters."""
_STOP_WORDS = frozenset(
    {
        *("a", "about", "an", "and", "any", "are", "as", "at", "be", "been", "but", "by", "can", "could", "did", "do"),
        *("does", "for", "from", "had", "has", "have", "he", "her", "his", "how", "i", "if", "in", "into", "is", "it"),
        *("its", "just", "like", "me", "more", "my", "no", "not", "of", "on", "or", "our", "out", "she", "so", "some"),
        *("than", "that", "the", "their", "them", "there", "these", "they", "this", "to", "too", "up", "us", "was"),
        *("we", "were", "what", "when", "where", "which", "who", "will", "with", "would", "you", "your"),
    }
)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without the commonest English ones.

    Text without spaces (Chinese, Japanese, Thai, ...) has no words that can be seen: there, every two neighbouring
    characters count as a word, and so does a character that stands alone.
    """
    terms: list[str] = []
    for run in _RUN.findall(text.casefold()):
        rest = _SPACELESS.sub(" ", run)
        terms += [w for w in rest.split() if len(w) > 1 and w not in _STOP_WORDS]
        for part in _SPACELESS.findall(run):
            terms += [part[i : i + 2] for i in range(len(part) - 1)] or [part]
    return terms
