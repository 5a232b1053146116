"""What the READMEs name exists: files, headings, tests, benches, recipes, the map."""

import re
import shlex
from pathlib import Path

import pytest

from tdm_r1.config import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(ROOT / name / "README.md" for name in ("bench", "kernels"))]
PAGES += sorted((ROOT / "tdm_r1").rglob("README.md"))
PAGES += [ROOT / "bench" / "results" / "NOTES.md"]
PYTEST = re.compile(r"`(?:python -m )?pytest ([^`]+)`")
# In words, not by name: each of these folders is one line of the map.
IN_WORDS = {"models", "rewards", "exported", "assets", "export"}


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in _anchors(file), target
    for command in PYTEST.findall(text):
        words = shlex.split(command.replace("\n", " "))
        expression = words.index("-k") if "-k" in words else len(words)
        paths = [ROOT / word for word in words[:expression] if not word.startswith("-")]
        assert all(path.exists() for path in paths), command
        files = [f for p in paths for f in ([p] if p.is_file() else p.rglob("test_*.py"))]
        tests = " ".join(re.findall(r"def (test_\w+)", " ".join(f.read_text() for f in files)))
        for word in " ".join(words[expression + 1 :]).split():
            assert word in ("or", "and", "not") or word in tests, command
    for name in re.findall(r"python -m bench\.(\w+)|bench/(\w+)\.py", text):
        assert (ROOT / "bench" / f"{''.join(name)}.py").is_file(), name
    for name in re.findall(r"--recipe ([\w-]+)", text):
        load_recipe(name)


def test_the_map_names_every_file_and_no_other():
    page = (ROOT / "README.md").read_text()
    text = page[page.index("## The map") :].split("```")[1]
    named = set(re.findall(r"\b(\w+\.py)\b", text))
    packages = [ROOT / "tdm_r1", ROOT / "kernels" / "tdm_kernels"]
    files = {f for package in packages for f in package.rglob("*.py") if f.name != "__init__.py"}
    assert named <= {f.name for f in files}
    drawn = {f.name for f in files if f.parent.name not in IN_WORDS}
    assert drawn <= named, sorted(drawn - named)
