"The benchmark for GPUs on a CPU: flops as PyTorch counts them, rows with all fields, a failing contender."
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from semmae.core import generator, read_json
from semmae.bench.gpu import (FULL, MODELS, TINY, TOY, Fixed, benchmark, on_paper, shape, step_flops,
                              take_turns, trainer)
from semmae.masking import random
from semmae.bench.speed import make_ours

CPU = torch.device('cpu')


@pytest.mark.parametrize('options', [dict(), dict(kind='cross'), dict(kind='cross', share=.25),
                                     dict(kind='cross', share=.01)], ids=str)
@pytest.mark.parametrize('model', [TINY, shape(48, 1, 3, 4, 24, (32, 3, 2))],
                         ids=['patches of 8', 'patches of 4'])
@pytest.mark.parametrize('ratio', [.75, .5])
def test_flops_are_those_that_pytorch_counts(model, options, ratio):
    mae, n = make_ours(model, **options), model['image']//model['patch']
    ids = random(torch.zeros(3, n, n), ratio, generator(0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mae(torch.randn(3, 3, model['image'], model['image']), *ids)[0].backward()
    assert counter.get_total_flops() == 3*step_flops(mae, ratio)


def test_a_base_model_takes_58_gflop_an_image():
    assert 57.5e9 < step_flops(make_ours(MODELS['ViT-B/16'])) < 58.5e9


def test_a_long_run_on_paper():
    one, eight, many = (on_paper(5000, 1e8, gpus) for gpus in (1, 8, 64))
    assert one['hours'] == pytest.approx(800*(1281167//4096)*4096/5000/3600) == one['gpu_hours']
    assert eight['step'] == pytest.approx(4096/8/5000 + 2*7/8*4e8/450e9)
    assert (many['step'] == pytest.approx(4096/64/5000 + 2*63/64*4e8/50e9)
            and many['gpu_hours'] == pytest.approx(64*many['hours']))
    assert (on_paper(5000, 1e8, 8, loader=9000) == eight
            and on_paper(5000, 1e8, 1, loader=2500)['hours'] == pytest.approx(2*one['hours']))


def test_contenders_take_turns():
    "The first step and a warm-up, then rounds, forth and back"
    calls = []
    rows = take_turns({k: lambda k=k: lambda n: calls.append((k, n)) for k in 'ab'}, CPU, rounds=3, n=2)
    assert calls == [('a', 1), ('a', 2), ('b', 1), ('b', 2)] + [(k, 2) for k in 'baabba']
    assert all(len(r['seconds']) == len(r['cores']) == 3 and r['first'] >= 0 for r in rows)


def test_a_trainer_learns_under_new_masks_and_goes_on():
    steps = []
    class Watched(Fixed):
        def at(self, step, *share):
            steps.append(step)
            return super().at(step, *share)
    watched = Watched(torch.randn(4, 3, 32, 32), (4, 4))
    train = trainer(TINY, CPU)(watched)
    train(2), train(1)
    assert steps == [0, 1, 2]
    assert not torch.equal(watched.at(0, 0, 1)[2], watched.at(1, 0, 1)[2])


def test_the_toy_benchmark(tmp_path):
    "All but compiling; the same blocks as on a GPU, one after another into one file"
    assert list(TOY) == list(FULL) and [m for m, _ in TOY.values()] == [m for m, _ in FULL.values()]
    blocks = ['ViT-S/16', 'profile', 'data', 'small', 'parts', 'teacher']
    for some in (blocks[:2], blocks[2:]):
        benchmark(tmp_path/'gpu.json', 'toy', some, log=lambda line: None)
    found = read_json(tmp_path/'gpu.json')
    assert list(found) == blocks
    for block in found.values():
        assert block['size'] == 'toy' and block['device'].startswith('CPU') and block['rate'] > 0
        assert block['rows'] and not [r for r in block['rows'] if 'error' in r]
    rounds = found['ViT-S/16']['rows'] + found['data']['rows']
    assert all(len(r['seconds']) == len(r['cores']) == 3 and r['batch'] == 4 and r['waits'] is None
               for r in rounds)
    assert [r['contender'] for r in found['small']['rows']] == ['semmae, None']
    assert all(r['first'] > 0 and r['epoch'] > 0 for r in found['small']['rows'] + found['teacher']['rows'])
