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

from semmae.core import SemmaeError
from semmae.pipeline.processes import launch
from semmae.pipeline.teacher import teacher_stage
from semmae.pipeline.train import train_stage
from semmae.pipeline.tune import finetune_stage, segment_stage

RESULTS = ['runs/teacher/encoder.safetensors', 'runs/teacher/history.csv', 'runs/parts/train.npy',
           'runs/metrics/teacher.json', 'runs/metrics/parts.json', 'runs/train/semmae/encoder.safetensors',
           'runs/train/semmae/loss.csv', 'runs/metrics/probe.json', 'runs/train/random/decoder.safetensors',
           'runs/metrics/train/inter.json', 'runs/finetune/semmae/answers.json',
           'runs/segment/untrained/maps.npz', 'runs/report/index.html']

TRAININGS, TUNED = ['semmae', 'random', 'untrained', 'inter'], ['semmae', 'random', 'untrained']
TRAIN = [f'train@{k}' for k in TRAININGS]
STAGES = ['teacher', 'parts', *TRAIN, 'probe',
          *(f'{stage}@{k}' for stage in ('finetune', 'segment') for k in TUNED), 'report']


@pytest.fixture
def done(project):
    "The clone after `dvc repro`, and what that printed; put back as it was when the test ends"
    yield project, (project/'.git/repro.log').read_text()
    restore(project)


def stages_of(out):
    "The stages that DVC said it runs"
    return re.findall(r"Running stage '([\w@]+)'", out)


def would_run(project):
    "The stages that have changed themselves; what depends on them is not among these"
    return stages_of(sh(project, 'dvc repro --dry').stdout)


def restore(project):
    "The clone as it was committed, its results back in place"
    sh(project, 'git checkout -q . && git clean -qfd && dvc checkout -q --force')


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
        'two steps call a foreground')


def test_every_score_says_what_it_was_measured_on(done):
    found = {s: json.loads((done[0]/'runs/metrics'/f"{s.replace('@', '/')}.json").read_text())
             for s in STAGES if s not in ('parts', 'report')}
    for name, scores in found.items():
        assert (scores['split'] == ('train' if name in TRAIN else 'test')
                and scores['images'] == 280 and scores['seed'] == 0), name
        assert (scores['checkpoint'] if name != 'probe'
                else scores['checkpoints'].keys() == set(TRAININGS)), name
    assert all(0 < found[f'finetune@{k}']['accuracy'] < 1 and 0 < found[f'segment@{k}']['frozen'] < 1
               for k in TUNED)


def test_a_training_without_what_it_needs_is_left_out(done):
    project, _ = done
    set_param(project, "parts: {source: two_level, n_parts: 4, share: 0.35}", "parts: {source: none}")
    train_stage(project, 'smoke', 'inter')
    assert 'skipped' in json.loads((project/'runs/metrics/train/inter.json').read_text())
    finetune_stage(project, 'smoke', 'inter')
    assert json.loads((project/'runs/metrics/finetune/inter.json').read_text()) == {}


def test_nothing_runs_twice(done):
    assert 'up to date' in sh(done[0], 'dvc repro').stdout


def test_report_is_one_page(done):
    page = (done[0]/'runs/report/index.html').read_text()
    assert page.count('<img src="data:image/png;base64,') == 8 and 'FG-NMI' in page and 'http' not in page
    assert 'smoke run' in page and 'linear probe' in page


def test_a_parameter_of_another_profile_reruns_nothing(done):
    set_param(done[0], 'epochs: 125', 'epochs: 126')
    assert would_run(done[0]) == []


def test_other_profiles_are_whole(done):
    "`dvc exp run -S profile=cifar10` and `tiny` find every parameter they need"
    for profile in yaml.safe_load((done[0]/'params.yaml').read_text())['profiles']:
        set_param(done[0], 'profile: smoke', f'profile: {profile}')
        assert sorted(would_run(done[0])) == ([] if profile == 'smoke' else sorted(['exported', *STAGES]))
        restore(done[0])


def test_unknown_profile(done):
    set_param(done[0], 'profile: smoke', 'profile: huge')
    out = sh(done[0], 'dvc repro', ok=False)
    assert out.returncode != 0 and 'profiles.huge' in out.stdout


def test_comparing_runs(done):
    "An experiment from the command line, as far as the probe, and what it changed"
    project, _ = done
    out = sh(project, 'dvc exp run -S profiles.smoke.pretrain.masking.ratio=0.6 probe').stdout
    assert set(stages_of(out)) == {'exported', *TRAIN, 'probe'}, (
        'one parameter of one kind of stage: those and what depends on them')
    assert 'masking.ratio' in sh(project, 'dvc params diff').stdout
    assert 'loss' in sh(project, 'dvc metrics diff').stdout
    assert 'linear' in sh(project, 'dvc metrics show').stdout
    sh(project, 'dvc plots diff -o plots')
    page = (project/'plots/index.html').read_text()
    assert page.count('<img') >= 1 and 'vega' in page.lower()


def test_forgotten_export(done):
    project, _ = done
    nb = project/'nbs/04_masking.ipynb'
    edited = nb.read_text().replace('Hide patches uniformly at random', 'Hide patches at random')
    assert edited != nb.read_text()
    nb.write_text(edited)
    out = sh(project, 'dvc repro', ok=False)
    assert out.returncode != 0
    assert ('exported: semmae/masking.py differs from its notebook: run `nbdev_export`, '
            'and `dvc repro` again') in out.stdout
    assert 'Traceback' not in out.stdout and stages_of(out.stdout) == ['exported']


@pytest.mark.parametrize('module, old, new, again', [
    ('02_show', 'fontsize=9, pad=4', 'fontsize=8, pad=4', {'report'}),
    ('06_attend', 'Attend within a head', 'Attend inside a head', set(STAGES)),
    ('04_masking', 'Hide patches uniformly at random', 'Hide patches at random', {*TRAIN, 'report'}),
    ('pipeline/glue/05_settings', 'is not a whole number', 'is no whole number', set())])
def test_an_edit_reruns_what_uses_it(done, module, old, new, again):
    "A picture only the report, a kernel all that runs an encoder, a masking all that hides, a check nothing"
    project, _ = done
    nb = project/f'nbs/{module}.ipynb'
    assert old in nb.read_text()
    nb.write_text(nb.read_text().replace(old, new, 1))
    sh(project, 'nbdev_export && dvc repro exported')
    assert set(would_run(project)) == again


def test_a_mistake_is_one_sentence(done):
    project, _ = done
    set_param(project, 'name: blend', 'name: blnd')
    out = sh(project, 'dvc repro', ok=False)
    assert out.returncode != 0 and 'exported: profiles.smoke.pretrain.masking.name is "blnd"' in out.stdout
    assert 'Traceback' not in out.stdout and stages_of(out.stdout) == ['exported'], 'before anything starts'
    assert (project/'dvc.lock').read_text() == sh(project, 'git show HEAD:dvc.lock').stdout


@pytest.mark.parametrize('stage, old, new, says', [
    (teacher_stage, 'source: data', 'source: nowhere', 'data.source'),
    (train_stage, 'lr: 1.0e-3', 'lr: 1.0e+9', 'pretrain.lr'),
    (train_stage, 'probe: {labels: [0.2]}', 'probe: {labels: [0.001]}', 'class cat-phones'),
    (train_stage, 'segment: {labels: 0.5', 'segment: {labels: 0.001', 'the training set'),
    (finetune_stage, 'labels: 0.5', 'labels: 0.001', 'class cat-phones'),
    (finetune_stage, 'patch_size: 8, embed_dim: 64', 'patch_size: 8, embed_dim: 96',
     'runs/train/semmae/encoder.safetensors'),
    (segment_stage, 'patch_size: 8, embed_dim: 64', 'patch_size: 8, embed_dim: 96',
     'runs/train/semmae/encoder.safetensors')],
    ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_what_only_a_stage_can_know_is_one_sentence(done, stage, old, new, says):
    "`semmae.pipeline.run` prints what is raised here, as above"
    set_param(done[0], old, new)
    with pytest.raises(SemmaeError, match=re.escape(says)) as e:
        stage(done[0])
    assert '\n' not in str(e.value)


def test_a_stage_that_is_killed_says_so(tmp_path):
    "As the kernel of a machine does when memory is short"
    (tmp_path/'nbs/pipeline').mkdir(parents=True)
    cell = new_code_cell('import os, signal\nos.kill(os.getpid(), signal.SIGKILL)')
    nbformat.write(new_notebook(cells=[cell]), tmp_path/'nbs/pipeline/train.ipynb')
    out = sh(tmp_path, f'PYTHONPATH={ROOT} python -m semmae.pipeline.run train', ok=False)
    assert out.returncode != 0 and out.stdout.splitlines()[-1].startswith(
        'train: its process was killed, most often for want of memory: lower `batch`')


def test_data_not_pulled(done):
    "DVC itself stops `dvc repro` and names the file; a stage started by itself says what to do"
    project, _ = done
    (project/'data').rename(project/'elsewhere')
    whole, stage = (sh(project, 'dvc repro', ok=False),
                    sh(project, 'python -m semmae.pipeline.run train', ok=False))
    (project/'elsewhere').rename(project/'data')
    assert whole.returncode != 0 and "'data.dvc': missing data" in whole.stdout
    assert stage.returncode != 0 and stage.stdout.endswith(
        'train: the demo images are not here: run `dvc pull data`\n')


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


@pytest.mark.parametrize('how, processes', [(signal.SIGINT, 1), (signal.SIGKILL, 1), (signal.SIGKILL, 2)])
def test_a_stopped_run_leaves_nothing_half_done(done, log, how, processes):
    project, _ = done
    known = lambda: yaml.safe_load((project/'dvc.lock').read_text())['stages']['train@semmae']
    before = known()
    set_param(project, 'epochs: 3', 'epochs: 3000')
    set_param(project, 'processes: 1', f'processes: {processes}')
    run = start(project, log)
    if how == signal.SIGINT:
        os.killpg(run.pid, how)  # Ctrl-C reaches the whole foreground group
    else:
        run.send_signal(how)
    run.wait(60)
    wait_for(lambda: not alive(project))
    assert known() == before
    assert not [f for f in RESULTS if f.startswith('runs/train/semmae/') and (project/f).exists()]


# of the same run DVC would remember the result
@pytest.mark.parametrize('flag, epochs', [('', 20), ('-f', 21)])
def test_an_interrupted_stage_goes_on_or_starts_afresh(done, log, flag, epochs):
    project, _ = done
    set_param(project, 'epochs: 3', f'epochs: {epochs}')
    start(project, log).kill()
    wait_for(lambda: not alive(project))
    out = sh(project, f'dvc repro -s {flag} train@semmae').stdout
    assert (f'epoch 1/{epochs}' in out) == bool(flag) and f'epoch {epochs}/{epochs}' in out
    assert not list((project/'runs/unfinished').iterdir())


def training_stages(root):
    "What each of two processes runs below"
    for stage, *entry in ((teacher_stage,), (train_stage, 'semmae'), (train_stage, 'inter'),
                          (finetune_stage, 'semmae'), (segment_stage, 'semmae')):
        stage(root, 'smoke', *entry)
        torch.distributed.barrier()


def test_several_processes(done, monkeypatch):
    "The stages that train do in two processes what they do in one"
    project, _ = done
    found = lambda: {f: json.loads((project/f'runs/metrics/{f}.json').read_text())
                     for f in ('teacher', 'train/semmae', 'train/inter', 'finetune/semmae',
                               'segment/semmae')}
    before = found()
    for f in before:
        (project/f'runs/metrics/{f}.json').unlink()
    monkeypatch.setenv('PYTHONPATH', f'{project}:{Path(__file__).parent}')
    launch(training_stages, str(project), processes=2)
    after = found()
    for f in 'train/semmae', 'train/inter', 'finetune/semmae':  # pairs are mixed within a process
        assert abs(after[f]['loss'] - before[f]['loss']) < .01
