"""The pages: every language has the same headings, links, tables and pictures, and no English left.

English is the original. Each check takes (original, translation), so that the tests at the end can
break a page on purpose and see the check notice.
"""

import re
from pathlib import Path

import mistune
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"root": ROOT, "unit1": ROOT / "unit1", "unit2": ROOT / "unit2"}
HANGUL, KANA, HAN = "가-힣", "ぁ-ゖァ-ヺー", "㐀-䶿一-鿿々"
# suffix: column of the glossary, characters of the script, characters that only it has
LANGUAGES = {"KR": ("한국어", HANGUL, HANGUL),
             "JA": ("日本語", KANA + HAN, KANA),
             "CN": ("简体中文", HAN, HAN)}
# The names of the platforms stay as they are.
NAMES = re.compile(r"\b(Colab|Kaggle|Gradient|Studio Lab|SageMaker)\b")
# Share of the script among the letters of a block, without code, links and numbers. English prose
# has 0. Blocks full of names, such as "Stable Diffusion" or a notebook's title, go down to 0.45 in
# Korean and lower in Chinese, whose words are shorter; so the line stands at a quarter.
# Sentences that hide among translated ones are found by ENGLISH instead: five Latin words in
# a row, which no name here has.
LEAST_SHARE = 0.25
ENGLISH = re.compile(r"(?:\b[A-Za-z][A-Za-z'’-]*\b[ ,;:]+){4}[A-Za-z]{2,}")
# English terms whose translation must appear wherever the English page has them. Left out are
# terms that good prose may paraphrase ("condition", "loss") or that have everyday meanings.
KEY_TERMS = {
    "diffusion model": r"\bdiffusion models?\b", "generative model": r"\bgenerative models?\b",
    "noise": r"\bnois(e|y)\b", "noise schedule": r"\bnoise schedule\b",
    "denoise": r"\bdenoises?\b", "sampling": r"\bsampling\b", "sampler": r"\bsamplers?\b",
    "scheduler": r"\bschedulers?\b", "timestep": r"\btimesteps?\b", "latent": r"\blatents?\b",
    "embedding": r"\bembeddings?\b", "fine-tuning": r"\bfine-tun(e|es|ed|ing)\b",
    "guidance": r"\bguidance\b", "guidance scale": r"\bguidance scale\b",
    "classifier-free guidance": r"\bclassifier-free guidance\b",
    "conditioning": r"\bconditioning\b", "class label": r"\bclass labels?\b",
    "cross-attention": r"\bcross-attention\b", "channel": r"\bchannels?\b",
    "gradient accumulation": r"\bgradient\s+accumulation\b",
    "weights (of a network)": r"\bweights\b",
    "training loop": r"\btraining loop\b", "pipeline": r"\bpipelines?\b",
    "flow matching": r"\bflow matching\b", "Fréchet distance": r"\bFréchet\s+distances?\b",
    "floor": r"\bfloor\b", "resolution": r"\bresolution\b", "model card": r"\bmodel cards?\b",
    "seed": r"\bseeds?\b", "judge (a classifier that scores samples)": r"\b(a|A) judge\b",
    "UNet": r"\bUNet\b", "segmentation map": r"\bsegmentation maps?\b", "mask": r"\bmasks?\b",
}


# --- reading a page ---------------------------------------------------------------------------

def parse(text):
    markdown = mistune.create_markdown(renderer="ast", plugins=["table", "strikethrough"])
    return [token for token in markdown(text) if token["type"] != "blank_line"]


def walk(tokens):
    """Every token of a page, depth first, in reading order."""
    for token in tokens:
        yield token
        yield from walk(token.get("children", []))


def prose(token, skip=("codespan", "link", "image")):
    """The words of a block without code, links and pictures."""
    if token["type"] in skip:
        return " "
    if token["type"] in ("softbreak", "linebreak"):
        return " "
    return token.get("raw", "") + "".join(prose(child, skip) for child in token.get("children", []))


def words(text):
    """All words that a reader sees, also those of links and picture descriptions."""
    return re.sub(r"\s+", " ", " ".join(prose(token, ("codespan",)) for token in parse(text)))


def find(text, kind):
    return [token for token in walk(parse(text)) if token["type"] == kind]


def without_language(target):
    """A target with any language suffix removed, so that pages of all languages compare."""
    return re.sub(rf"README_({'|'.join(LANGUAGES)})\.md", "README.md", target)


def targets(text, kind):
    return [without_language(token["attrs"]["url"]) for token in find(text, kind)]


def shape(token):
    """What a block is, with as much of its structure as a translation has to keep."""
    if token["type"] == "heading":
        return f"heading {token['attrs']['level']}"
    if token["type"] == "list":
        return f"list of {len(token['children'])}"
    if token["type"] == "table":
        head, body = token["children"]
        return f"table of {len(body['children'])} x {len(head['children'])}"
    return token["type"]


def commands(token):
    """A code block without its comments, which a translation may translate."""
    return [re.sub(r"\s+#\s.*", "", line).rstrip() for line in token["raw"].splitlines()]


def numbers(token):
    return set(re.findall(r"\d+(?:[.,]\d+)*", prose(token, ("codespan", "image"))))


def glossary():
    """English term -> {column: [accepted forms]}."""
    rows = re.findall(r"^\| (.+) \|$", (ROOT / "GLOSSARY.md").read_text("utf-8"), re.MULTILINE)
    head, *body = ([cell.strip() for cell in row.split(" | ")] for row in rows)
    assert all(len(row) == len(head) for row in body), "each line has every language"
    return {row[0]: {column: [form.strip() for form in cell.split("/")]
                     for column, cell in zip(head[1:], row[1:], strict=True)} for row in body}


# --- the checks: each yields one sentence for each problem --------------------------------------

def differences(original, page):
    """Where a translation has another structure than the English page."""
    first, second = [shape(t) for t in parse(original)], [shape(t) for t in parse(page)]
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            yield f"block {i + 1}: a {a} in English, a {b} here: {prose(parse(page)[i])[:60]!r}"
            break
    else:
        if len(first) != len(second):
            yield f"{len(first)} blocks in English, {len(second)} here"
        else:
            for a, b in zip(parse(original), parse(page), strict=True):
                missing = numbers(a) - numbers(b)
                if missing:
                    yield f"the number {', '.join(sorted(missing))} is missing: {prose(b)[:60]!r}"
    for kind in ("link", "image"):
        a, b = sorted(targets(original, kind)), sorted(targets(page, kind))
        for target in sorted(set(a + b)):
            if a.count(target) != b.count(target):
                yield (f"{kind} {target}: {a.count(target)} times in English, "
                       f"{b.count(target)} times here")
    a, b = (map(commands, find(text, "block_code")) for text in (original, page))
    if list(a) != list(b):
        yield "the code blocks hold other commands"


def undescribed(page):
    """Pictures without alternative text."""
    for image in find(page, "image"):
        if not prose({"type": "", "children": image["children"]}).strip():
            yield f"{image['attrs']['url']} has no alternative text"


def texts(page):
    """Each block of prose: paragraphs, list items, headings, table cells, own pictures' texts."""
    for token in walk(parse(page)):
        if token["type"] in ("paragraph", "block_text", "heading", "table_cell"):
            yield prose(token)
        elif token["type"] == "image" and "://" not in token["attrs"]["url"]:
            yield prose({"type": "", "children": token["children"]})


def left_in_english(page, script, own):
    """Blocks of a translated page that are not, or not wholly, in its language."""
    for text in texts(page):
        text = NAMES.sub(" ", text)
        latin, native = len(re.findall("[A-Za-z]", text)), len(re.findall(f"[{script}]", text))
        if latin + native == 0:
            continue
        short = text.strip()[:70]
        if native / (latin + native) < LEAST_SHARE:
            yield f"{native / (latin + native):.0%} in the script: {short!r}"
        elif ENGLISH.search(text):
            yield f"English words in a row: {ENGLISH.search(text).group()!r}"
        elif native > 40 and not re.search(f"[{own}]", text):
            yield f"another language: {short!r}"


def other_terms(original, page, column, entries):
    """Key terms that the English page uses and the translation calls something else."""
    english, translated = words(original), words(page)
    for term, pattern in KEY_TERMS.items():
        if re.search(pattern, english):
            forms = entries[term][column]
            if not any(form in translated for form in forms):
                yield f"{term!r} should be {' or '.join(forms)}"


def dead_links(path, text):
    """Relative links and pictures whose file is not there."""
    for token in walk(parse(text)):
        url = token.get("attrs", {}).get("url", "")
        if url and "://" not in url and not url.startswith(("#", "mailto:")):
            if not (path.parent / url.split("#")[0]).exists():
                yield url


# --- the pages -----------------------------------------------------------------------------------

def pages(folder):
    return [folder / "README.md"] + [folder / f"README_{suffix}.md" for suffix in LANGUAGES]


every_page = pytest.mark.parametrize(
    "path", [p for f in FOLDERS.values() for p in pages(f)],
    ids=lambda path: str(path.relative_to(ROOT)))
every_translation = pytest.mark.parametrize(
    "path,suffix", [(f / f"README_{s}.md", s) for f in FOLDERS.values() for s in LANGUAGES],
    ids=lambda value: str(value.relative_to(ROOT)) if isinstance(value, Path) else value)


def original_of(path):
    return (path.parent / "README.md").read_text("utf-8")


@every_page
def test_page_is_whole(path):
    """It exists, opens with links to all languages, describes its pictures, links to real files."""
    text = path.read_text("utf-8")
    first = [token["attrs"]["url"] for token in walk(parse(text)[1:2]) if token["type"] == "link"]
    assert first == [page.name for page in pages(path.parent)]
    assert list(undescribed(text)) == []
    assert list(dead_links(path, text)) == []


@every_translation
def test_translation_has_the_same_structure(path, suffix):
    assert list(differences(original_of(path), path.read_text("utf-8"))) == []


@every_translation
def test_translation_links_to_its_own_language(path, suffix):
    """A page that exists in the reader's language is linked in that language."""
    for url in (t["attrs"]["url"] for t in walk(parse(path.read_text("utf-8"))[2:])
                if t["type"] == "link"):
        name = url.split("/")[-1]
        if name == "README.md" and (path.parent / url).resolve().parent in FOLDERS.values():
            raise AssertionError(f"{url} should be README_{suffix}.md")


@every_translation
def test_no_english_is_left(path, suffix):
    _, script, own = LANGUAGES[suffix]
    assert list(left_in_english(path.read_text("utf-8"), script, own)) == []


@every_translation
def test_translation_keeps_to_the_glossary(path, suffix):
    assert list(other_terms(original_of(path), path.read_text("utf-8"), LANGUAGES[suffix][0],
                            glossary())) == []


def test_glossary_is_complete():
    entries = glossary()
    assert set(KEY_TERMS) <= set(entries)
    assert list(entries) == sorted(entries, key=str.lower)
    for term, columns in entries.items():
        assert list(columns) == [column for column, *_ in LANGUAGES.values()]
        for column, script, _ in LANGUAGES.values():
            assert all(re.search(f"[{script}]", form) or form == term    # a name: UNet
                       for form in columns[column]), (term, column)


def test_other_pages_have_live_links():
    for path in (ROOT / "CONTRIBUTING.md", ROOT / "GLOSSARY.md"):
        assert list(dead_links(path, path.read_text("utf-8"))) == []


# --- the checks can fail -----------------------------------------------------------------------

ENGLISH_PAGE = """# Noise

[English](README.md) · [한국어](README_KR.md) · [日本語](README_JA.md) · [简体中文](README_CN.md)

A [diffusion model](https://example.org/a) removes noise in 50 steps, and you can watch it do so.

## Pictures

![A butterfly](butterfly.png)

| a | b |
|---|---|
| picture | noise |

```bash
make lab       # opens JupyterLab
```

The model begins with noise. It ends with a picture.
"""
KOREAN_PAGE = """# 노이즈

[English](README.md) · [한국어](README_KR.md) · [日本語](README_JA.md) · [简体中文](README_CN.md)

[확산 모델](https://example.org/a)은 50단계로 노이즈를 제거하며, 그 과정을 지켜볼 수 있습니다.

## 그림

![나비 한 마리](butterfly.png)

| 가 | 나 |
|---|---|
| 그림 | 노이즈 |

```bash
make lab       # JupyterLab을 엽니다
```

모델은 노이즈에서 시작합니다. 그림으로 끝납니다.
"""


def problems(page):
    return [*differences(ENGLISH_PAGE, page), *undescribed(page),
            *left_in_english(page, HANGUL, HANGUL),
            *other_terms(ENGLISH_PAGE, page, "한국어", glossary())]


def test_a_good_translation_has_no_problems():
    assert problems(KOREAN_PAGE) == []


@pytest.mark.parametrize("good,bad,notice", [
    ("## 그림\n\n", "", "a heading 2 in English"),
    ("## 그림", "### 그림", "a heading 2 in English, a heading 3 here"),
    ("[확산 모델](https://example.org/a)", "확산 모델", "link https://example.org/a: 1 times"),
    ("example.org/a", "example.org/b", "link https://example.org/b: 0 times"),
    ("(butterfly.png)", "(moth.png)", "image moth.png: 0 times"),
    ("![나비 한 마리]", "![]", "no alternative text"),
    ("![나비 한 마리]", "![A butterfly]", "0% in the script: 'A butterfly'"),
    ("| 그림 | 노이즈 |\n", "", "a table of 1 x 2 in English, a table of 0 x 2"),
    ("| 그림 | 노이즈 |", "| picture | 노이즈 |", "0% in the script: 'picture'"),
    ("make lab ", "make course ", "other commands"),
    ("50단계", "40단계", "the number 50 is missing"),
    ("\n모델은 노이즈에서 시작합니다. 그림으로 끝납니다.\n", "", "8 blocks in English, 7 here"),
    ("모델은 노이즈에서 시작합니다. 그림으로 끝납니다.",
     "The model begins with noise. It ends with a picture.", "0% in the script"),
    ("그림으로 끝납니다.", "It ends with a picture. 모델은 노이즈에서 시작하여 그림으로 끝납니다.",
     "English words in a row"),
    ("확산 모델", "디퓨전 모델", "'diffusion model' should be 확산 모델"),
])
def test_a_damaged_translation_is_noticed(good, bad, notice):
    assert KOREAN_PAGE.count(good) == 1
    found = problems(KOREAN_PAGE.replace(good, bad))
    assert any(notice in problem for problem in found), found


def test_chinese_left_in_a_japanese_page_is_noticed():
    sentence = "扩散模型从纯噪声开始，一步一步地去除噪声，直到得到一张新的图片。" * 2
    assert list(left_in_english(sentence, *LANGUAGES["JA"][1:]))
    assert not list(left_in_english(sentence, *LANGUAGES["CN"][1:]))


def test_a_dead_link_is_noticed():
    assert list(dead_links(ROOT / "README.md", "[a](nothing.md) [b](LICENSE)")) == ["nothing.md"]
