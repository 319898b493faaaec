"""README: every Python snippet runs, the commands are the ones that CI runs, the table of models is true."""

import re
from pathlib import Path

import pytest
import timm
import torch

import hydra_vision  # noqa: F401

README = (Path(__file__).resolve().parents[1] / 'README.md').read_text()
SNIPPETS = re.findall(r'```python\n(.*?)```', README, flags=re.DOTALL)


def test_there_are_snippets_and_nothing_left_to_fill_in():
    assert len(SNIPPETS) >= 3
    assert 'PLACEHOLDER' not in README


@pytest.mark.parametrize('snippet', SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs(snippet):
    namespace = {}
    exec(compile(snippet, 'README.md', 'exec'), namespace)
    # what the comments promise: a name, then its shape
    for name, shape in re.findall(r'^(\w+) = .*# \((\d[\d, ]*)\)', snippet, flags=re.MULTILINE):
        assert tuple(namespace[name].shape) == tuple(int(n) for n in shape.split(',')), name


@pytest.mark.parametrize('name', ['run', 'test'])
def test_commands_are_marked_for_ci(name):
    command = re.search(rf'<!-- command: {name} -->\n```bash\n(.*?)\n```', README, flags=re.DOTALL)
    assert command
    assert 'venv' in command[1]
    assert 'pip install -e' in command[1]


ROWS = re.findall(r'^\| `(hydra_vit_\w+)` \| (\d+) \| (\d+) \| ([\d.]+) M \| ([\d.]+) \|', README, flags=re.MULTILINE)


def test_table_lists_the_family():
    assert {row[0] for row in ROWS} == set(timm.list_models('hydra_vit_*'))


@pytest.mark.parametrize(('name', 'width', 'depth', 'millions', 'gmacs'), ROWS)
def test_table_row(name, width, depth, millions, gmacs):
    from torch.utils.flop_counter import FlopCounterMode

    model = timm.create_model(name, device='meta').eval()
    assert (model.embed_dim, len(model.blocks)) == (int(width), int(depth))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(float(millions), rel=2e-3)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    assert counter.get_total_flops() / 2e9 == pytest.approx(float(gmacs), rel=5e-3)
