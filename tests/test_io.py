"""Files: whole or not at all, tables, paths from a shell."""

import errno
from pathlib import Path

import pytest

from hydra_vision.errors import UserError, WriteError
from hydra_vision.io import make_output, read_csv, to_path, write_atomically, write_csv


class Interrupted(BaseException):
    """Stands for Ctrl-C and the like."""


@pytest.mark.parametrize('failure', [OSError(errno.ENOSPC, 'No space left on device'), RuntimeError('write failed')])
def test_a_write_that_fails_half_way_keeps_the_old_file(tmp_path, failure):
    path = tmp_path / 'file'
    path.write_text('old')

    def write(file):
        file.write(b'half of the n')
        raise failure

    with pytest.raises(WriteError, match=r'could not write .*the previous file is intact'):
        write_atomically(path, write)
    assert [item.name for item in tmp_path.iterdir()] == ['file']
    assert path.read_text() == 'old'


def test_an_interrupt_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')

    def write(file):
        file.write(b'half')
        raise Interrupted

    with pytest.raises(Interrupted):
        write_atomically(path, write)
    assert [item.read_text() for item in tmp_path.iterdir()] == ['old']


def test_csv_round_trip(tmp_path):
    path = tmp_path / 'rows.csv'
    rows = [{'name': 'a, "b"\nc', 'value': 1.5}, {'name': None}]
    write_csv(path, rows)
    assert read_csv(path) == [{'name': 'a, "b"\nc', 'value': '1.5'}, {'name': '', 'value': ''}]
    write_csv(path, [], columns=['name'])
    assert path.read_text() == 'name\n'
    with pytest.raises(ValueError):
        write_csv(path, rows, columns=['name'])
    assert path.read_text() == 'name\n'


@pytest.mark.parametrize('content', [b'a,b\n1\n', b'a,b\n1,2,3\n', b'a,b\n\xff,1\n', None])
def test_a_damaged_csv_is_one_line(tmp_path, content):
    path = tmp_path / 'rows.csv'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_csv(path)
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)


def test_paths_of_a_shell(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    assert to_path('~/x') == Path('/home/me/x')
    for text in ('', '\0', '~no-such-user-here/x'):
        with pytest.raises(UserError):
            to_path(text, '--output')


def test_make_output(tmp_path):
    assert make_output(tmp_path / 'a' / 'b').is_dir()
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='--output'):
        make_output(tmp_path / 'file' / 'x')
