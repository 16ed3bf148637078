"""How people explain a dislike in their own words: a pattern for each kind of complaint."""

COMPLAINTS: dict[str, str] = {
    "clickbait": r"clickbait|promis|misleading|nothing of the title|标题党|骗点击|名不副实",
    "unpleasant": r"disgust|creep|sick|blood|horrible|gross|gore|scary|恶心|血腥|恐怖|吓人",
    "vulgar": r"vulgar|crude|rude|swear|language|obscene|低俗|粗俗|脏话|下流",
    "repetition": r"before|again|same|repeat|already|重复|看过|又是",
    "mismatch": r"not care|not my thing|not interest|why am i shown|boring|irrelevant|不感兴趣|没兴趣|无聊|无关",
    "too_long": r"too long|no time|watch that long|太长|没时间",
    "moment": r"not now|just now|wrong moment|at the moment|accident|by mistake|误触|不想看|以后再",
}
"""Name of the complaint -> regular expression, to be searched in lower-case text; the first that fits counts."""
