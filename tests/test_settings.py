"Random edits of params.yaml: each is refused in a sentence that names a key, or everything runs."
import copy
import json
import os
import random
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, make_photos
from everything import run_everything

from semmae.core import SemmaeError, options_of
from semmae.evaluate import score
from semmae.finetune import finetune
from semmae.mae import DECODERS, MAE
from semmae.masking import STRATEGIES, find_strategy
from semmae.parts import SOURCES
from semmae.pipeline.params import read_params, read_yaml
from semmae.pipeline.settings import check_params
from semmae.pipeline.study import read_study, rows_of
from semmae.pretrain import pretrain
from semmae.segment import segment
from semmae.sources import load_images
from semmae.teacher import distil
from semmae.vit import make_encoder
from semmae.weights import open_encoder

PROFILES = list(read_yaml(ROOT/'params.yaml')['profiles'])
MICRO = dict(
    seed=0, processes=1, data=dict(source='photos', size=[16, 16], channels=3, limit=None, stream=False),
    teacher=dict(encoder=dict(patch_size=4, embed_dim=16, depth=2, num_heads=2, image=[8, 8]),
                 epochs=1, batch=8, warmup_epochs=0, n_words=8, lr=.001, n_small=1, judge_every=1, clip=3.,
                 large=[.4, 1.]),
    parts=dict(source='two_level', n_parts=3, share=.4, block=1, foreground_block=None),
    encoder=dict(name='vit_tiny_patch16_224', patch_size=4, embed_dim=16, depth=1, num_heads=2),
    decoder=dict(kind='self', width=16, depth=1, heads=2),
    pretrain=dict(masking=dict(name='blend', ratio=.5, gamma=2), epochs=1, batch=8, lr=.001, warmup_epochs=0,
                  weight_decay=.05, crop_scale=[.5, 1.], clip=None, ema=None, accumulate=1,
                  optimizer='adamw'),
    probe=dict(labels=[.5]),
    finetune=dict(labels=[1.], epochs=1, batch=8, lr=.001, warmup_epochs=0, mixup=.8, drop_path=.1),
    segment=dict(labels=1., epochs=1, warmup_epochs=0))
WORDS = ['', 'x', 'data', '0.5', 'é', '~no one', 'a\0b', 300*'x', None, True, False]
NUMBERS = [0, -1, 1, 2, 3, 5, 7, 64, .3, 1.5, -.1, 1., float('inf'), float('nan')]
HUGE = [10**3, 10**6, 10**12, 10**400, 1e-300, 1e300, 2**63, -2**40]
BLOCKS = [[], [1], [.5, 2], [[1]], ['a', None], {}, {'a': 1}, {'name': 'x'}, {'epochs': 3}]


def places(block, path=()):
    "Every key in nested blocks and lists"
    for key in (block if isinstance(block, dict) else range(len(block))):
        yield (*path, key)
        if isinstance(block[key], (dict, list)):
            yield from places(block[key], (*path, key))


def edited(params, rng, values, among=None):
    "A copy with one key changed, renamed, removed or added, and where"
    params = copy.deepcopy(params)
    *path, key = rng.choice([p for p in places(params)
                             if among is None or p[:len(among)] == among and len(p) > len(among)])
    block = params
    for k in path:
        block = block[k]
    how = rng.choice(['change']*6 + ['remove', 'rename', 'add'])
    if how == 'change' or isinstance(block, list):
        alike = [v for v in values if type(v) is type(block[key])]
        block[key] = rng.choice(alike if alike and rng.random() < .6 else values)
    elif how == 'add':
        block['extra'] = rng.choice(values)
    else:
        value = block.pop(key)
        if how == 'rename':
            block[key[:-1]] = value
    return params, (how, *path, key)


def refused(act, what):
    "Whether a sentence refuses an edit and names its key or block; whatever else is raised is a failure"
    try:
        act()
    except SemmaeError as e:
        keys = [k for k in what[1:] if isinstance(k, str)] + ['extra']*(what[0] == 'add')
        assert '\n' not in str(e) and any(k in str(e) for k in keys[-3:]), (what, str(e))
        return True
    except Exception as e:
        raise AssertionError(what) from e
    return False


def read_everything(path, profile, studies):
    check_params(path, profile)
    for name in studies:
        rows_of(read_study(path.parent, name))


def fuzz_checks(folder, n, seed=0):
    "How many of `n` edits of the project's params.yaml are refused"
    rng, params = random.Random(seed), read_yaml(ROOT/'params.yaml')
    (folder/'nbs/studies/cifar10_parts').mkdir(parents=True)
    (folder/'data').mkdir()
    (folder/'data/teacher.safetensors').touch()
    for weights in 'mae', 'semmae':
        (folder/'data'/weights).mkdir()
        (folder/'data'/weights/'encoder.safetensors').touch()
    count = 0
    for _ in range(n):
        profile = rng.choice(PROFILES)
        new, what = edited(params, rng, WORDS + NUMBERS + HUGE + BLOCKS,
                           rng.choice([None, ('profiles', profile)]))
        (folder/'params.yaml').write_text(json.dumps(new))
        studies = what[2:3] if what[1] == 'studies' else ()
        count += refused(lambda: read_everything(folder/'params.yaml', profile, studies), what)
    return count


def fuzz_runs(folder, n, seed=0):
    "How many of `n` edits of a small profile are refused, some of them only by a stage"
    rng = random.Random(seed)
    make_photos(folder/'photos')
    params, count = dict(profile='p', profiles=dict(p=MICRO), ablations=dict(semmae={}),
                         trainings=dict(semmae='runs/parts'), tuned=['semmae']), 0
    for _ in range(n):
        new, what = edited(params, rng, WORDS + NUMBERS + BLOCKS, ('profiles', 'p'))
        (folder/'params.yaml').write_text(json.dumps(new))
        count += refused(lambda: run_everything(folder), what)
    return count


def test_of_random_edits_none_ends_in_a_traceback(tmp_path):
    assert 6 < fuzz_checks(tmp_path, 24) < 24


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr('builtins.print', lambda *args, **kw: None)


def test_what_is_not_refused_runs(tmp_path, quiet):
    assert 3 < fuzz_runs(tmp_path, 12) < 12


@pytest.mark.parametrize('profile', PROFILES)
def test_every_profile_is_right(profile):
    read_params(ROOT/'params.yaml', profile)


def test_a_profile_that_is_not_there_is_named():
    with pytest.raises(SemmaeError, match='profiles.huge'):
        read_params(ROOT/'params.yaml', 'huge')


@pytest.mark.parametrize('profile', PROFILES)
def test_no_value_repeats_a_default(profile):
    "But for `epochs` of a teacher, which tells that it is trained and not opened"
    cfg = read_yaml(ROOT/'params.yaml')['profiles'][profile]
    source, teacher, masking = cfg['parts']['source'], cfg['teacher'] or {}, cfg['pretrain']['masking']
    blocks = [(cfg['data'], load_images), (cfg['encoder'], make_encoder), (cfg['probe'], score),
              (cfg['decoder'], MAE, *DECODERS.values()), (cfg['finetune'], finetune),
              (cfg['segment'], segment), (cfg['pretrain'], pretrain),
              (masking, find_strategy, STRATEGIES[masking['name']]),
              (teacher, distil if 'epochs' in teacher else open_encoder),
              (teacher.get('encoder', {}), make_encoder),
              (cfg['parts'], *([SOURCES[source]] if source in SOURCES else []))]
    for block, *functions in blocks:
        same = {k for k, (_, default) in options_of(*functions).items()
                if block.get(k, 'not there') == default}
        assert not same - {'masking', 'epochs'*(block is teacher)}, block


@pytest.mark.parametrize('entry', read_yaml(ROOT/'params.yaml')['ablations'])
def test_every_entry_is_right(entry):
    read_params(ROOT/'params.yaml', 'cifar10', entry)


def test_every_study_is_right():
    for name in read_yaml(ROOT/'params.yaml')['studies']:
        assert rows_of(read_study(ROOT, name))


def said_of(folder, **edits):
    "What is said of the project's params.yaml after edits; `a__b=1` changes the key b of the block a"
    params = read_yaml(ROOT/'params.yaml')
    for place, value in edits.items():
        *path, key = place.split('__')
        block = params
        for k in path:
            block = block[k]
        block[key] = value
    (folder/'params.yaml').write_text(json.dumps(params))
    os.symlink(ROOT/'data', folder/'data')
    with pytest.raises(SemmaeError) as e:
        check_params(folder/'params.yaml', 'tiny')
    return str(e.value)


def test_all_wrong_keys_are_named_at_once(tmp_path):
    "Of the wrong type, unknown, wrong beside others, in trainings and in what is fine-tuned"
    said = said_of(tmp_path, profiles__tiny__decoder__width=None, profiles__tiny__decoder__depht=2,
                   profiles__tiny__pretrain__masking=dict(name='blend', ratio=2, gama=1),
                   profiles__tiny__processes=7, profiles__tiny__pretrain__batch=3,
                   profiles__tiny__finetune__warmup_epochs=9, profiles__tiny__segment__warmup_epochs=9,
                   profiles__tiny__encoder__num_heads=7, profiles__tiny__decoder__heads=7,
                   profiles__tiny__teacher=dict(name='nope', weights='nofile'),
                   ablations__random=dict(pretrian={}, decodr={}, decoder=dict(share=2)),
                   ablations__heads=dict(seed='x'),
                   trainings__nobody='data', tuned=['semme'], studis={})
    for key in ('decoder.width', 'decoder.depht', 'pretrain.masking.ratio', 'pretrain.masking.gama'):
        assert f'profiles.tiny.{key} ' in said
    for key in ('finetune.batch', 'pretrain.batch', 'finetune.warmup_epochs', 'segment.warmup_epochs',
                '`encoder`', 'decoder.heads', 'teacher.name', 'teacher.weights',
                'ablations.random.pretrian', 'ablations.nobody', 'ablations.random.decodr',
                'ablations.random.decoder.share', 'ablations.heads.seed', 'semme', 'studis'):
        assert key in said, key
    for near in ('depth', 'gamma', 'pretrain', 'decoder', 'semmae', 'studies'):
        assert f'write {near}' in said, near
    assert said.count('decoder.width') == 1, 'once, not again for every training'


def test_a_training_waits_for_what_it_looks_at(tmp_path):
    "Parts of a grid do not wait for the teacher, which this masking looks through"
    said = said_of(tmp_path, profiles__tiny__parts=dict(source='grid', n_parts=4),
                   profiles__tiny__pretrain__masking=dict(name='attention_high', ratio=.75))
    assert 'trainings.semmae' in said and 'runs/teacher' in said


@pytest.mark.parametrize('given', ['runs/parts', 'nonsense/path', 5, None])
def test_a_training_that_looks_at_nothing_waits_for_nothing(tmp_path, given):
    assert 'trainings.random' in said_of(tmp_path, trainings__random=given)


def test_a_training_begins_with_no_other(tmp_path):
    assert 'pretrain.start' in said_of(tmp_path, ablations__semmae_400=dict(
        pretrain=dict(start='runs/train/random')))


def test_what_lacks_a_block_is_said_of_the_profile_alone(tmp_path):
    said = said_of(tmp_path, profiles__tiny={k: v for k, v in read_yaml(ROOT/'params.yaml')[
        'profiles']['tiny'].items() if k != 'encoder'})
    assert 'encoder' in said and 'ablations' not in said


if __name__ == '__main__':
    import tempfile
    for fuzz, n in zip((fuzz_checks, fuzz_runs), map(int, sys.argv[1:])):
        with tempfile.TemporaryDirectory() as folder:
            print(f'{fuzz.__name__}: {fuzz(Path(folder), n)} of {n} refused, none ended in a traceback')
