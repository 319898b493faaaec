"""Arguments of commands, tables, progress."""

import argparse
import io

import pytest
from rich.console import Console

from hydra_vision import console
from hydra_vision.errors import UserError


@pytest.mark.parametrize(
    ('parse', 'text', 'value'),
    [
        (console.comma_list, 'a, b', ['a', 'b']),
        (console.positive, '3', 3),
        (console.positive_list, '64,128', [64, 128]),
        (console.non_negative, '0', 0),
        (console.image_size, '224', (224, 224)),
        (console.image_size, '224x448', (224, 448)),
        (console.image_sizes, '224,32X64', [(224, 224), (32, 64)]),
    ],
)
def test_argument_types(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ('parse', 'texts'),
    [
        (console.comma_list, ('', 'a,,b')),
        (console.positive, ('0', '-1', '1.5', 'x', '')),
        (console.non_negative, ('-1', 'x')),
        (console.image_size, ('0', '1000000', '224x', 'x', '1x2x3', '-1x5', '')),
        (console.path, ('', '\0')),
        (console.non_empty, ('',)),
    ],
)
def test_arguments_that_are_not_valid(parse, texts):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_parser_says_one_line_and_takes_no_abbreviation(capsys):
    parser = console.Parser(prog='tool', example='tool --size 3')
    parser.add_argument('--size', type=console.positive)
    assert 'tool --size 3' in parser.format_help()
    for argv in (['--siz', '3'], ['--size', '0'], ['x']):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(argv)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count('\n') == 1


def test_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match='hydra_vit_tiny'):
        console.check_model_name('hydra_vit_tyni')


def test_tables_keep_brackets():
    text = io.StringIO()
    Console(file=text, width=80, markup=False).print(
        console.make_table('t', ['name', 'n'], [['[red]', '1']], right=[1])
    )
    assert '[red]' in text.getvalue()
    assert console.markdown_table(['a', 'b'], [['1', '2']]) == '| a | b |\n| --- | --- |\n| 1 | 2 |\n'


def test_progress_counts_only_this_process():
    with console.progress('images') as meter:
        meter(100, 200)
        assert meter.speed() == 'nothing was left to do'
        meter(150, 200)
        assert meter.speed().endswith(' images/s')
