"""Checks the documentation: links resolve, names exist, code blocks run.

A name is inline code that begins with `crcm_jax.`: it must be a module or an
attribute that can be imported. Every fenced block marked `python` runs in a
fresh namespace, unless its fence says `python no-run`.

Usage: `python tools/check_docs.py README.md docs`.
"""

import pathlib
import pydoc
import re
import sys
import traceback
import warnings

FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAME = re.compile(r"`(crcm_jax(?:\.\w+)+)(?:\(\))?`")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def main(arguments: list[str]) -> int:
  """Checks all pages named or found below the folders named."""
  pages = [page for name in arguments for page in _pages(pathlib.Path(name))]
  checks = (_links, _names, _blocks)
  problems = [p for page in pages for check in checks for p in check(page)]
  for problem in problems:
    print(problem, file=sys.stderr)
  print(f"{len(pages)} pages checked, {len(problems)} problems")
  return bool(problems)


def _pages(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path.rglob("*.md")) if path.is_dir() else [path]


def _links(page: pathlib.Path):
  """Yields one message for each relative link that leads nowhere."""
  text = FENCE.sub("", page.read_text())
  for target in LINK.findall(text):
    if re.match(r"[a-z]+:", target):
      continue
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    if not file.exists():
      yield f"{page}: link to `{target}`: no such file"
    elif anchor and file.suffix == ".md" and anchor not in _anchors(file):
      yield f"{page}: link to `{target}`: no such heading"


def _names(page: pathlib.Path):
  """Yields one message for each name of the library that does not exist."""
  for name in dict.fromkeys(NAME.findall(FENCE.sub("", page.read_text()))):
    if pydoc.locate(name) is None:
      yield f"{page}: `{name}`: no such module or attribute"


def _anchors(page: pathlib.Path) -> set[str]:
  headings = HEADING.findall(page.read_text())
  kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
  return {heading.strip().replace(" ", "-") for heading in kept}


def _blocks(page: pathlib.Path):
  """Runs the Python blocks; yields one message for each that fails."""
  text = page.read_text()
  for match in FENCE.finditer(text):
    language, options, code = match.groups()
    if language != "python" or "no-run" in options:
      continue
    line = text.count("\n", 0, match.start()) + 1
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(code, f"{page}:{line}", "exec"), {"__name__": "__docs__"})
    except Exception:
      yield f"{page}:{line}: the code block fails\n{traceback.format_exc()}"


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
