"Every profile for data that is not here, with tiny models, on an imitation of its data set."
import pytest
from conftest import ROOT, random_images, small_encoder
from everything import run_everything
from imitations import IMITATIONS
from PIL import Image

from semmae.core import read_json, write_json
from semmae.mae import MAE
from semmae.pipeline.params import read_yaml
from semmae.weights import save_mae

PROFILES = read_yaml(ROOT/'params.yaml')['profiles']
ENCODER = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2, image=[32, 32])
SHORT = dict(epochs=1, batch=8, warmup_epochs=0)
# profile -> the imitations that it runs on
OTHERS = 'ade20k', 'cub', 'cars', 'aircraft', 'flowers', 'pets', 'inat2017', 'inat2018', 'inat2019'
SETS = dict(imagenet=['imagenet', 'shards'], imagenet_p8=['imagenet']) | {k: [k] for k in OTHERS}


def shrunk(cfg, source):
    "A profile with everything that it says, but for sizes and numbers of steps"
    patch = 4 if 'patch8' in cfg['encoder']['name'] else 8
    small = cfg | dict(processes=1, encoder=ENCODER | dict(patch_size=patch),
                       decoder=dict(width=16, depth=1, heads=2),
                       data=cfg['data'] | dict(source=str(source), size=[36, 36]))
    if cfg['teacher']:
        small['teacher'] = SHORT | dict(encoder=ENCODER, image=[32, 32], n_words=8, n_small=1)
    small['pretrain'] = cfg['pretrain'] | (SHORT if cfg['pretrain'].get('epochs') != 0 else {})
    small['probe'] = {k: SHORT | v for k, v in cfg['probe'].items() if k == 'lars'}
    small['finetune'], small['segment'] = cfg['finetune'] | SHORT, cfg['segment'] | SHORT
    if scenes := cfg['segment'].get('scenes'):
        small['segment']['scenes'] = scenes | dict(size=[32, 32], steps=2, batch=2, warmup_steps=1,
                                                   channels=8)
    return small


def write_params(root, cfg):
    write_json(root/'params.yaml', dict(
        profile='p', profiles=dict(p=cfg), trainings=dict(semmae='runs/parts'), tuned=['semmae'],
        ablations=dict(semmae={})))


@pytest.mark.parametrize('profile, name', [(k, name) for k, names in SETS.items() for name in names])
def test_a_profile_runs(tmp_path, profile, name):
    root, cfg = tmp_path/'project', shrunk(PROFILES[profile], IMITATIONS[name](tmp_path/'data'))
    write_params(root, cfg)
    if start := cfg['pretrain'].get('start'):
        save_mae(MAE(small_encoder(), width=16, depth=1, heads=2), root/start)
    run_everything(root, report=profile in ('imagenet_p8', 'ade20k'))
    found = {k: read_json(root/f'runs/metrics/{k}/semmae.json') for k in ('train', 'finetune', 'segment')}
    assert found['train']['images'] > 0 and 'skipped' not in found['train']
    if 'lars' in cfg['probe']:
        assert 0 <= read_json(root/'runs/metrics/probe.json')['semmae']['lars']['class'] <= 1
    if name == 'ade20k':
        assert all(0 <= found['segment'][k]['iou'] <= 1 for k in ('frozen', 'nearest', 'tuned'))
        assert 0 <= found['segment']['whole']['miou'] <= 1
    else:
        assert 0 <= found['finetune']['labels']['1']['accuracy'] <= 1 and found['finetune']['images'] > 0


def test_every_profile_is_run_somewhere():
    assert PROFILES.keys() - SETS.keys() == {'smoke', 'tiny', 'demo', 'demo_teacher', 'cifar10',
                                             'cifar10_small'}


def test_images_without_labels_run(tmp_path):
    (tmp_path/'photos').mkdir()
    for i, img in enumerate(random_images(40, 40, 48)):
        Image.fromarray(img.permute(1, 2, 0).numpy()).save(tmp_path/f'photos/{i}.jpg')
    cfg = shrunk(PROFILES['imagenet'], 'photos')
    del cfg['data']['held']  # there are no images for test
    write_params(tmp_path, cfg)
    run_everything(tmp_path)
    for stage in 'finetune', 'segment':
        assert read_json(tmp_path/f'runs/metrics/{stage}/semmae.json') == {}
    assert 'semmae' not in read_json(tmp_path/'runs/metrics/probe.json')
    assert (tmp_path/'runs/report/index.html').stat().st_size


def test_profiles_say_what_was_published():
    "MAE's fine-tuning beside the defaults of `finetune`, on all images that are not test"
    for profile in 'imagenet', 'imagenet_p8', 'inat2017', 'inat2018', 'inat2019':
        assert PROFILES[profile]['finetune'] == dict(labels=[1.], augment='rand-m9-mstd0.5-inc1', min_lr=1e-6,
                                                     head_std=2e-5, frame=.875)
    for profile in SETS:
        assert PROFILES[profile]['data']['held'] == 0
    assert PROFILES['imagenet']['pretrain']['batch'] == 4096
