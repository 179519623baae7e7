"What a contributor can forget: exporting, cleaning, a stage's parameters, a stage's dependencies."
import ast
import importlib
import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT
from execnb.nbio import read_nb

from semmae.core import read_json
from semmae.pipeline.code import stale_modules
from semmae.train import imported, modules_of

STAGES = sorted(ROOT.glob('nbs/pipeline/*.ipynb'))
name = lambda p: str(p.relative_to(ROOT))


def test_modules_are_what_the_notebooks_say():
    assert stale_modules(ROOT) == []
    modules = {p.relative_to(ROOT/'semmae') for p in ROOT.glob('semmae/**/*.py')
               if p.name not in ('__init__.py', '_modidx.py')}
    exported = {Path(line.split()[-1].replace('.', '/') + '.py')
                for nb in ROOT.glob('nbs/**/*.ipynb') for c in read_nb(nb).cells
                for line in c.source.splitlines() if line.startswith('#| default_exp')}
    assert modules == exported, 'a module without a notebook'


def test_notebooks_are_clean(tmp_path):
    "`nbdev_clean` would change nothing"
    shutil.copy(ROOT/'settings.ini', tmp_path)
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    subprocess.run(['nbdev_clean'], cwd=tmp_path, check=True)
    copies = [p.relative_to(tmp_path) for p in tmp_path.glob('nbs/**/*.ipynb')]
    dirty = [str(p) for p in copies if (ROOT/p).read_text() != (tmp_path/p).read_text()]
    assert not dirty, f'run `nbdev_clean`: {dirty}'


@pytest.mark.parametrize('path', STAGES, ids=name)
def test_stage_has_parameters_and_no_outputs(path):
    cells = nbformat.read(path, 4).cells
    assert sum('parameters' in c.metadata.get('tags', []) for c in cells) == 1
    assert not any(c.get('outputs') for c in cells)


@pytest.mark.parametrize('path', STAGES, ids=name)
def test_stage_depends_on_its_notebook_and_its_code(path):
    "The file that the stage `exported` writes, and no list by hand"
    stage = yaml.safe_load((ROOT/'dvc.yaml').read_text())['stages'][path.stem]
    deps = stage.get('do', stage)['deps']
    if path.stem == 'exported':
        return
    code = 'train/${key}' if path.stem == 'train' else path.stem
    assert ({name(path), f'runs/code/{code}.json'} <= set(deps)
            and not any(d.startswith('semmae') for d in deps))


def test_nothing_else_at_the_top():
    files = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split('\n')
    top = {f.split('/')[0] for f in files if f and not f.startswith('.')}
    assert top <= {'nbs', 'semmae', 'tests', 'runs', 'data.dvc', 'dvc.yaml', 'dvc.lock', 'params.yaml',
                   'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE'}


def test_settings_are_read():
    "The version in settings.ini is the package's"
    from configparser import ConfigParser
    import semmae
    settings = ConfigParser()
    settings.read(ROOT/'settings.ini')
    assert settings['DEFAULT']['version'] == semmae.__version__


def test_the_wheel_is_the_library():
    "No glue, no benchmark, no generator of the demo, and no module of the library that imports them"
    assert tomllib.loads((ROOT/'pyproject.toml').read_text())['tool']['setuptools']['packages'] == ['semmae']
    for path in ROOT.glob('semmae/[!_]*.py'):
        assert not [name for name in imported(path.read_text()) if '.' in name], path


@pytest.mark.parametrize('folder, package', [('nbs', ''), ('nbs/pipeline/glue', 'pipeline.')])
def test_a_chapter_uses_only_chapters_before_it(folder, package):
    "Its examples, too; the glue also uses the library, and an example what the demo's images are read with"
    notebooks = sorted((ROOT/folder).glob('[0-9]*.ipynb'))
    chapters = {package + p.stem[3:]: int(p.stem[:2]) for p in notebooks}
    assert sorted(chapters.values()) == list(range(len(chapters)))
    for path, (module, number) in zip(notebooks, chapters.items()):
        code = '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code')
        used = {name for name in modules_of(code)
                if name.startswith(package) and not name.startswith('demo.')}
        assert all(chapters.get(name, 99) <= number for name in used), (module, used)


def test_lines_are_short_and_hold_one_statement():
    "In cells and tests; a body is not on the line of its head"
    sources = {name(p): p.read_text() for p in ROOT.glob('tests/*.py')}
    for path in ROOT.glob('semmae/**/[!_]*.py'):  # whose list of names nbdev writes
        sources[name(path)] = re.sub(r'__all__ = \[.*?\]\n', '', path.read_text(), count=1, flags=re.S)
    for path in ROOT.glob('nbs/**/*.ipynb'):
        code = ['\n'.join(line for line in c.source.splitlines() if not line.startswith(('%', '!')))
                for c in nbformat.read(path, 4).cells if c.cell_type == 'code']
        sources |= {f'{name(path)} {i}': source for i, source in enumerate(code)}
    others = {(f, (ROOT/f).read_text()) for f in ('params.yaml', 'dvc.yaml', 'pyproject.toml', '.ci/run')}
    for where, source in sources.items() | others:
        assert not [line for line in source.splitlines() if len(line) > 110], where
    for where, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            bodies = [getattr(node, k, None) for k in ('body', 'orelse', 'finalbody')]
            for body in [b for b in bodies if isinstance(b, list) and b]:
                starts = [s.lineno for s in body]
                assert len(starts) == len(set(starts)), (where, starts)
                assert isinstance(node, ast.Module) or body[0].lineno > node.lineno, (where, node.lineno)


def test_library_needs_no_development_tool():
    "Nothing that the library imports when it loads comes from the extra `dev`"
    dev = {'pydantic', 'yaml', 'nbdev', 'dvc', 'papermill', 'jupyterlab', 'ipykernel', 'fastcore', 'execnb',
           'pytest', 'hypothesis', 'robohash', 'IPython'}
    for path in ROOT.glob('semmae/[!_]*.py'):
        for node in ast.parse(path.read_text()).body:
            names = ([a.name for a in node.names] if isinstance(node, ast.Import)
                     else [node.module] if isinstance(node, ast.ImportFrom) else [])
            assert not {n.split('.')[0] for n in names if n} & dev, path


def test_the_committed_scores_lie_where_six_seeds_say():
    "And above those of the encoder before training"
    known, here = (read_json(ROOT/p) for p in ('nbs/studies/tiny.json', 'runs/metrics/probe.json'))
    for name, (lo, hi) in known['intervals'].items():
        how, target = name.split()
        assert (lo <= 100*here['semmae'][how][target] <= hi
                and here['semmae'][how][target] > here['untrained'][how][target]), name


@pytest.mark.parametrize('path', sorted(ROOT.glob('nbs/**/*.ipynb')), ids=name)
def test_what_a_notebook_imports_is_there(path):
    "Studies are not run by any test: what they take from the library has to exist all the same"
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != 'code' or cell.source.lstrip().startswith(('%', '!')):
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or '').startswith('semmae'):
                continue
            for alias in node.names:
                module = importlib.import_module(node.module)
                assert (hasattr(module, alias.name)
                        or importlib.util.find_spec(f'{node.module}.{alias.name}')), (
                    f'{node.module}.{alias.name}')
