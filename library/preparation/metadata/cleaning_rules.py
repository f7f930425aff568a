"""The rules of clean_captions_and_tags.py, made to be changed: add, take out and reorder what suits your images.

Captions: each pair is (words, what is written for them). Capitals do not count, only whole words are found, and an "a"
or "an" in front is made to fit. The pairs are gone through in their order, again and again until nothing changes.

Tags: patterns of whole tags, as regular expressions. Underscores are spaces by then.
"""

from __future__ import annotations

CAPTION_RULES = (
    ("anime anime", "anime"),
    ("young", ""),
    ("anime girl", "girl"),
    ("anime girls", "girls"),
    ("anime female", "girl"),
    ("anime lady", "girl"),
    ("anime woman", "girl"),
    ("anime women", "girls"),
    ("anime character", "girl"),
    ("anime characters", "girls"),
    ("cartoon girl", "girl"),
    ("cartoon girls", "girls"),
    ("cartoon female", "girl"),
    ("cartoon lady", "girl"),
    ("cartoon woman", "girl"),
    ("cartoon women", "girls"),
    ("cartoon character", "girl"),
    ("cartoon characters", "girls"),
    ("lady", "girl"),
    ("female", "girl"),
    ("woman", "girl"),
    ("women", "girls"),
    ("people", "girls"),
    ("person", "girl"),
    ("a cartoon figure", "a figure"),
    ("a cartoon image", "an image"),
    ("a cartoon picture", "a picture"),
    ("a cartoon drawing", "a drawing"),
    ("an anime figure", "a figure"),
    ("an anime image", "an image"),
    ("an anime picture", "a picture"),
    ("an anime drawing", "a drawing"),
    ("girl girl", "girl"),
)

# Tags about one person. Where several persons are in the image and one of these patterns is found more than once,
# it is not known who is meant, so all that it finds are removed.
ONE_PERSONS_TAGS = (
    r"(long|short|medium) hair",
    r"(bob|hime) cut",
    r"[\w-]+ eyes",
    r"[\w-]+ sleeves|sleeveless",
    r"ponytail|twintails|ahoge|sidelocks|two tails|two side up|two side down"
    r"|braid|[\w-]+ braid|[\w-]+ bun|single (hair|side) bun",
    r"(?!(long|short|medium) )[\w-]+ hair",
)

SEVERAL_PERSONS = r"(.*[\s\d+])?(girls|boys)"  # a tag that says so, such as 2girls, 6+boys or multiple girls
CUT_FROM = r"rating.*"  # this tag and all behind it are removed, unless it is the first
