"""docs/*.md: every section runs as it stands.

A section (a `##` heading) is one test. Its `python` blocks share one namespace and its blocks run in order, in an empty
folder; `bash` blocks run line by line, `hydra-vision ...` inside this process. Blocks of any other kind (`text`) are
shown and not run. `<!-- needs: smp transformers -->` below the heading names optional modules without which the section
is skipped, `<!-- slow -->` says that a push does not run it. A comment `# (2, 3)` behind an assignment states the shape
of what is assigned, or of each of its elements.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hydra_vision import cli

DOCS = Path(__file__).resolve().parents[1] / 'docs'
SECTIONS = [
    pytest.param(
        *(page.name, body),
        id=f'{page.stem}: {title}',
        marks=[pytest.mark.slow] if '<!-- slow -->' in body else [],
    )
    for page in sorted(DOCS.glob('*.md'))
    for title, body in re.findall(r'^## (.*?)\n(.*?)(?=^## |\Z)', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    if re.search(r'^```(python|bash)$', body, flags=re.MULTILINE)
]


def test_there_are_sections():
    assert len(SECTIONS) >= 10


@pytest.mark.parametrize(('page', 'body'), SECTIONS)
def test_section_runs(page, body, tmp_path, monkeypatch, request):
    for names in re.findall(r'<!-- needs: (.*?) -->', body):
        for name in names.split():
            pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))  # recipes may set them
    namespace = {'__name__': 'docs'}
    for kind, block in re.findall(r'^```(python|bash)\n(.*?)^```$', body, flags=re.MULTILINE | re.DOTALL):
        if kind == 'bash':
            for line in block.replace('\\\n', ' ').splitlines():
                run_command(shlex.split(line, comments=True))
            continue
        exec(compile(block, page, 'exec'), namespace)
        for name, shape in re.findall(r'^(\w+) = .*# \((\d[\d, ]*)\)', block, flags=re.MULTILINE):
            expected = tuple(int(n) for n in shape.replace(' ', '').strip(',').split(','))
            value = namespace[name]
            for each in value if isinstance(value, (list, tuple)) else [value]:
                assert tuple(each.shape) == expected, name


def run_command(command: list[str]) -> None:
    if not command:
        return
    if command[0] == 'hydra-vision':
        assert cli.main(command[1:]) == 0, command
        return
    if command[0] == 'python':
        command[0] = sys.executable
    environment = {**os.environ, 'PYTHONPATH': str(DOCS.parent)}  # benchmarks/ is no part of the package
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_between_pages():
    root = DOCS.parent
    for page in [*DOCS.glob('*.md'), root / 'README.md']:
        for target in re.findall(r'\]\((?!https?:|#)([^)#]+)', page.read_text()):
            assert (page.parent / target).exists(), f'{page.name}: {target}'


def test_api_named_in_the_pages_exists():
    """`hydra_vision.x.y` in running text is something that can be imported."""
    for page in DOCS.glob('*.md'):
        text = re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for name in set(re.findall(r'`(hydra_vision(?:\.\w+)+)(?:\(.*?\))?`', text)):
            module, _, attribute = name.rpartition('.')
            try:
                found = hasattr(importlib.import_module(module), attribute)
            except ModuleNotFoundError:
                found = False
            if not found:
                importlib.import_module(name)
