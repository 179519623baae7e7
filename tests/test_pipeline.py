"The pipeline as a user meets it: in a clone, at the profile `smoke`, through the commands of the README."
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from conftest import ROOT, environment, sh, wait_for
from nbformat.v4 import new_code_cell, new_notebook
from worker import answer

from semmae.core import SemmaeError, file_hash
from semmae.pipeline.code import write_code
from semmae.pipeline.processes import launch, side_by_side
from semmae.pipeline.ship import ship
from semmae.pipeline.teacher import teacher_stage
from semmae.pipeline.train import train_stage
from semmae.pipeline.tune import finetune_stage, segment_stage
from semmae.weights import load_encoder

RESULTS = ['runs/teacher/encoder.safetensors', 'runs/teacher/history.csv', 'runs/parts/train.npy',
           'runs/metrics/teacher.json', 'runs/metrics/parts.json', 'runs/train/semmae/encoder.safetensors',
           'runs/train/semmae/loss.csv', 'runs/metrics/probe.json', 'runs/train/semmae/decoder.safetensors',
           'runs/metrics/train/untrained.json', 'runs/finetune/semmae/answers.json',
           'runs/segment/semmae/maps.npz', 'runs/report/index.html']

TRAININGS = ['semmae', 'untrained']
TRAIN = [f'train@{k}' for k in TRAININGS]
STAGES = ['teacher', 'parts', *TRAIN, 'probe', 'finetune@semmae', 'segment@semmae', 'report']


@pytest.fixture
def done(project):
    "The clone after `dvc repro`, and what that printed; put back as it was when the test ends"
    before = times(project)
    yield project, (project/'.git/repro.log').read_text()
    after = times(project)
    changed = after != before
    for p in after.keys() - before.keys():
        p.unlink()
    sh(project, 'git checkout -q . && git clean -qfd')
    if changed:
        sh(project, 'dvc checkout -q --force')


def times(project):
    "When every result was written"
    return {p: p.stat().st_mtime_ns for p in (project/'runs').rglob('*') if p.is_file()}


def stages_of(out):
    "The stages that DVC said it runs"
    return re.findall(r"Running stage '([\w@]+)'", out)


def would_run(project):
    "The stages that have changed themselves; what depends on them is not among these"
    return stages_of(sh(project, 'dvc repro --dry').stdout)


def set_param(project, old, new):
    text = (project/'params.yaml').read_text()
    assert old in text
    (project/'params.yaml').write_text(text.replace(old, new, 1))


def test_repro_makes_everything_and_says_how_far_it_is(done):
    project, out = done
    for f in RESULTS:
        assert (project/f).stat().st_size > 0, f
    assert re.search(r'epoch 3/3  loss \d\.\d+  \d+ images/s  0:00 left', out)
    assert sorted(stages_of(out)) == sorted(['exported', *STAGES])
    scores = json.loads((project/'runs/metrics/probe.json').read_text())
    assert scores['split'] == 'test' and all(0 < scores[k]['linear']['class'] < 1 for k in TRAININGS)
    assert 'called_iou' in json.loads((project/'runs/metrics/parts.json').read_text())['test'], (
        'learned parts call a foreground')


def test_every_score_says_what_it_was_measured_on(done):
    found = {s: json.loads((done[0]/'runs/metrics'/f"{s.replace('@', '/')}.json").read_text())
             for s in STAGES if s not in ('parts', 'report')}
    for name, scores in found.items():
        assert (scores['split'] == ('train' if name in TRAIN else 'test')
                and scores['images'] == 280 and scores['seed'] == 0), name
        assert (scores['checkpoint'] if name != 'probe'
                else scores['checkpoints'].keys() == set(TRAININGS)), name
    tuned = found['finetune@semmae']['labels']
    assert 0 < tuned['0.5']['labelled'] < 280 and 0 < tuned['0.5']['accuracy'] < 1
    for row in (found['segment@semmae'][k] for k in ('frozen', 'tuned', 'background')):
        assert 0 < row['low'] < row['iou'] < row['high'] < 1


def test_a_training_without_what_it_needs_is_left_out(done):
    project, _ = done
    set_param(project, "parts: {source: learned, n_parts: 4}", "parts: {source: none}")
    train_stage(project, 'smoke', 'inter')
    assert 'skipped' in json.loads((project/'runs/metrics/train/inter.json').read_text())
    finetune_stage(project, 'smoke', 'inter')
    assert json.loads((project/'runs/metrics/finetune/inter.json').read_text()) == {}
    train_stage(project, 'smoke', 'mae_400')
    why = json.loads((project/'runs/metrics/train/mae_400.json').read_text())['skipped']
    assert 'data/mae' in why, 'the weights there are of another encoder'


def test_a_training_is_kept_and_another_begins_with_it(done):
    project, _ = done
    ship(project, 'smoke', 'semmae', project/'kept')
    about = json.loads((project/'kept/about.json').read_text())
    assert about['config']['pretrain']['epochs'] == 3 and (project/'kept/loss.csv').stat().st_size
    set_param(project, 'start: data/mae', 'start: kept')
    train_stage(project, 'smoke', 'mae_400')
    files = [project/f'runs/train/{k}/encoder.safetensors' for k in ('semmae', 'mae_400')]
    assert about['checkpoint'] == file_hash(files[0])
    long, rounded = (load_encoder(f).state_dict() for f in files)
    for name, value in long.items():
        assert torch.allclose(value, rounded[name], atol=1e-6, rtol=1e-3), name


def test_nothing_runs_twice(done):
    assert 'up to date' in sh(done[0], 'dvc repro').stdout


def test_report_is_one_page(done):
    page = (done[0]/'runs/report/index.html').read_text()
    assert page.count('<img src="data:image/png;base64,') == 8 and 'FG-NMI' in page and 'http' not in page


def test_a_parameter_of_another_profile_reruns_nothing(done):
    set_param(done[0], 'epochs: 125', 'epochs: 126')
    assert would_run(done[0]) == []


def test_another_profile_runs_everything(done):
    set_param(done[0], 'profile: smoke', 'profile: cifar10')
    assert sorted(would_run(done[0])) == sorted(['exported', *STAGES])


def test_comparing_runs(done):
    "An experiment from the command line, and what it changed"
    project, _ = done
    out = sh(project, 'dvc exp run -S profiles.smoke.pretrain.masking.ratio=0.6 train@semmae').stdout
    assert set(stages_of(out)) == {'exported', 'train@semmae'}
    assert 'loss' in sh(project, 'dvc metrics diff').stdout
    sh(project, 'dvc plots diff')
    page = (project/'dvc_plots/index.html').read_text()
    assert page.count('<img') >= 1 and 'vega' in page.lower()


def test_forgotten_export(done):
    project, _ = done
    nb = project/'nbs/04_masking.ipynb'
    edited = nb.read_text().replace('Hide patches uniformly at random', 'Hide patches at random')
    assert edited != nb.read_text()
    nb.write_text(edited)
    out = sh(project, 'dvc repro', ok=False)
    assert out.returncode != 0
    assert 'semmae/masking.py' in out.stdout and 'Traceback' not in out.stdout
    assert stages_of(out.stdout) == ['exported']
    assert (project/'dvc.lock').read_text() == sh(project, 'git show HEAD:dvc.lock').stdout


def test_an_edit_reruns_what_uses_it(done):
    project, _ = done
    nb = project/'nbs/04_masking.ipynb'
    nb.write_text(nb.read_text().replace('Hide patches uniformly at random', 'Hide patches at random'))
    sh(project, 'nbdev_export && dvc repro exported')
    assert set(would_run(project)) == {*TRAIN, 'report'}


def test_what_a_stage_runs_is_noted(done):
    "A plot only for the report, a kernel for all that runs an encoder, a source of parts not for its readers"
    project, _ = done
    code = project/'runs/code'
    noted = lambda: {str(p.relative_to(code).with_suffix('')): file_hash(p) for p in code.rglob('*.json')}
    trained = {f'train/{k}' for k in TRAININGS}
    for module, again in dict(show={'report'}, learn={'parts', 'report'},
                              attend=trained | {k.split('@')[0] for k in STAGES} - {'train'},
                              **{'pipeline/settings': set()}).items():
        before = noted()
        with open(project/f'semmae/{module}.py', 'a') as f:
            f.write('# another\n')
        write_code(project)
        assert {k for k, v in noted().items() if v != before[k]} - {'exported'} == again


def test_a_mistake_is_one_sentence(done):
    project, _ = done
    set_param(project, 'name: blend', 'name: blnd')
    out = sh(project, 'python -m semmae.pipeline.run exported smoke', ok=False)
    assert out.returncode != 0 and 'Traceback' not in out.stdout
    assert 'profiles.smoke.pretrain.masking.name' in out.stdout.splitlines()[-1]


@pytest.mark.parametrize('stage, old, new, named', [
    (teacher_stage, 'source: data', 'source: nowhere', 'data.source'),
    (train_stage, 'lr: 1.0e-3', 'lr: 1.0e+9', 'pretrain.lr'),
    (train_stage, 'probe: {labels: [0.2]}', 'probe: {labels: [0.001]}', 'probe.labels'),
    (train_stage, 'segment: {labels: 0.5', 'segment: {labels: 0.001', 'segment.labels'),
    (finetune_stage, 'patch_size: 8, embed_dim: 64', 'patch_size: 8, embed_dim: 96',
     'runs/train/semmae/encoder.safetensors')],
    ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_what_only_a_stage_can_know_is_named(done, stage, old, new, named):
    "`semmae.pipeline.run` prints what is raised here, as above"
    set_param(done[0], old, new)
    with pytest.raises(SemmaeError, match=f'^[^\n]*{named}[^\n]*$'):
        stage(done[0])


@pytest.mark.parametrize('code', ['import os, signal\nos.kill(os.getpid(), signal.SIGKILL)',
                                  'import torch\ntorch.empty(10**15)'], ids=['killed', 'refused'])
def test_a_stage_without_enough_memory_says_so(tmp_path, code):
    "Whether it is killed, as the kernel of a machine does, or what it asks for is refused"
    (tmp_path/'nbs/pipeline').mkdir(parents=True)
    nbformat.write(new_notebook(cells=[new_code_cell(code)]), tmp_path/'nbs/pipeline/train.ipynb')
    out = sh(tmp_path, f'PYTHONPATH={ROOT} python -m semmae.pipeline.run train', ok=False)
    assert out.returncode != 0 and '`batch`' in out.stdout.splitlines()[-1]


def alive(project):
    "Processes that work in the clone"
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            cwd, command = os.readlink(p/'cwd'), (p/'cmdline').read_text()
        except OSError:
            continue
        if cwd.startswith(str(project)) and ('semmae' in command or 'ipykernel' in command
                                             or 'dvc' in command):
            found.append(int(p.name))
    return found


def start(project, log):
    "`dvc repro` of one stage in the background, once its training has come to its second epoch"
    with open(log, 'w') as f:
        # a background job inherits "ignore"
        run = subprocess.Popen(['dvc', 'repro', '-s', 'train@semmae'], cwd=project, env=environment(project),
                               stdout=f, stderr=f, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for(lambda: re.search(r'epoch 2/\d\d', log.read_text()), 180)
    return run


@pytest.fixture
def log(done):
    "Where a run in the background writes; whatever is left of it ends with the test"
    yield done[0]/'runs/log'
    for pid in alive(done[0]):
        os.kill(pid, signal.SIGKILL)
    (done[0]/'runs/log').unlink()
    shutil.rmtree(done[0]/'runs/unfinished', ignore_errors=True)


def stopped(project, log, stop):
    "A run that is stopped, by whatever, leaves no process and nothing half done"
    known = lambda: yaml.safe_load((project/'dvc.lock').read_text())['stages']['train@semmae']
    before, run = known(), start(project, log)
    stop(run.pid)
    run.wait(60)
    wait_for(lambda: not alive(project))
    assert known() == before
    assert not [f for f in RESULTS if f.startswith('runs/train/semmae/') and (project/f).exists()]


def test_a_killed_run_leaves_nothing(done, log):
    project, _ = done
    set_param(project, 'epochs: 3', 'epochs: 3000')
    set_param(project, 'processes: 1', 'processes: 2')
    stopped(project, log, lambda pid: os.kill(pid, signal.SIGKILL))


def test_an_interrupted_stage_goes_on_or_starts_afresh(done, log):
    "Ctrl-C reaches the whole foreground group"
    project, _ = done
    set_param(project, 'epochs: 3', 'epochs: 40')
    stopped(project, log, lambda pid: os.killpg(pid, signal.SIGINT))
    state = project/'runs/unfinished/train-semmae.pt'
    kept = state.read_bytes()
    for flag, first in (('', False), ('-f', True)):
        state.write_bytes(kept)
        out = sh(project, f'dvc repro -s {flag} train@semmae').stdout
        assert ('epoch 1/40' in out) == first and 'epoch 40/40' in out
        assert not list(state.parent.iterdir())


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_work_is_done_side_by_side(two_threads, capsys):
    "In processes that share the cores and say what they do"
    assert side_by_side(answer, ['one', 'two']) == [1, 1]
    assert sorted(capsys.readouterr().out.split()) == sorted(2*['asked'] + ['one', 'two'])
    for call in 'wrong', 'die':
        with pytest.raises(SemmaeError):
            side_by_side(answer, ['one', call])


def training_stages(root):
    "What each of two processes runs below"
    for stage in teacher_stage, train_stage, finetune_stage, segment_stage:
        stage(root, 'smoke')
        torch.distributed.barrier()


def test_several_processes(done, monkeypatch):
    "The stages that train do in two processes what they do in one"
    project, _ = done
    found = lambda: {f: json.loads((project/f'runs/metrics/{f}.json').read_text())
                     for f in ('teacher', 'train/semmae', 'finetune/semmae', 'segment/semmae')}
    before = found()
    for f in before:
        (project/f'runs/metrics/{f}.json').unlink()
    monkeypatch.setenv('PYTHONPATH', f'{project}:{Path(__file__).parent}')
    launch(training_stages, str(project), processes=2)
    after = found()
    assert abs(after['train/semmae']['loss'] - before['train/semmae']['loss']) < .01
    for share, row in after['finetune/semmae']['labels'].items():  # pairs are mixed within a process
        assert abs(row['loss'] - before['finetune/semmae']['labels'][share]['loss']) < .01
