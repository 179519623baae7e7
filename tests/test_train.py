"What a step sees is a function of (seed, step): the curriculum survives a resume and is the same on any number of processes. And: a bad loss."
import pytest
import torch

from semmae.core import SemmaeError, generator
from semmae.mae import MAE, load_mae
from semmae.masking import STRATEGIES, strategy
from semmae.train import Batches, pretrain
from semmae.vit import make_encoder

IMAGES = torch.randint(0, 256, (40, 3, 32, 48), dtype=torch.uint8, generator=generator('images'))
GUIDES = {'parts': torch.randint(0, 5, (40, 9, 7), dtype=torch.uint8, generator=generator('maps')), 'scores': torch.rand(40, 9, 7, generator=generator('scores')), None: None}


def batches(name, **kw):
    return Batches(IMAGES, (4, 6), GUIDES[STRATEGIES[name].looks_at], dict(name=name), epochs=4, batch=10, **kw)


@pytest.mark.parametrize('name', STRATEGIES)
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(name):
    through = batches(name)
    seen = [through[step] for step in range(through.steps)]
    for step in (0, 7, 15):
        for a, b in zip(batches(name)[step], seen[step]): assert torch.equal(a, b)


@pytest.mark.parametrize('name', STRATEGIES)
@pytest.mark.parametrize('ranks', [2, 3, 10])
def test_processes_share_the_batch_of_one(name, ranks):
    "Order, crops and masks exactly; pixels but for the order of sums. 3 does not divide the batch"
    for step in (0, 13):
        shares = [batches(name, rank=r, ranks=ranks)[step] for r in range(ranks)]
        imgs, keep, mask = (torch.cat(x) for x in zip(*shares))
        whole = batches(name)[step]
        assert torch.equal(keep, whole[1]) and torch.equal(mask, whole[2])
        assert torch.allclose(imgs, whole[0], atol=1e-5)
        assert torch.equal(torch.cat([batches(name, rank=r, ranks=ranks).ids(step) for r in range(ranks)]), batches(name).ids(step))


def test_progress_is_the_step_counter():
    seen = []
    try:
        @strategy()
        def spy(x, ratio, gen, progress=0.):
            seen.append(progress)
            return STRATEGIES['random'](x, ratio, gen)
        for step in (0, 4, 8, 15): batches('spy')[step]
        assert seen == [0, .25, .5, 15/16]
    finally: STRATEGIES.pop('spy', None)


def test_seeds_and_steps_differ():
    assert not torch.equal(batches('blend')[0][2], batches('blend', seed=1)[0][2]) and not torch.equal(batches('blend')[0][2], batches('blend')[1][2])


def small(cls=MAE): return cls(make_encoder(image=(32, 48), patch_size=8, embed_dim=32, depth=1, num_heads=2), width=32, depth=1, heads=2)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_bad_loss_names_its_step_and_keeps_the_last_good_weights(tmp_path, bad):
    class Breaks(MAE):
        steps = 0
        def loss(self, *args):
            self.steps += 1
            return super().loss(*args)*(bad if self.steps == 10 else 1.)
    mae, good = small(Breaks), []
    log = lambda line: good.append({k: v.clone() for k, v in mae.state_dict().items()})
    with pytest.raises(SemmaeError, match=fr'the loss became {bad} at step 10 \(epoch 3\): lower `pretrain.lr`; the weights after epoch 2 are in {tmp_path}'):
        pretrain(mae, IMAGES, epochs=4, batch=10, warmup_epochs=1, keep=tmp_path, log=log)
    kept = load_mae(tmp_path, width=32, depth=1, heads=2).state_dict()
    assert len(good) == 2 and all(torch.equal(good[-1][k], kept[k]) for k in kept)


def test_weights_that_broke_in_the_last_step_of_an_epoch_are_not_kept(tmp_path):
    class Breaks(MAE):
        steps = 0
        def loss(self, *args):
            self.steps += 1
            loss = super().loss(*args)
            if self.steps == 8: loss.register_hook(lambda g: g*float('nan'))  # a good loss with a bad gradient
            return loss
    with pytest.raises(SemmaeError, match=r'the weights are no longer numbers after step 8 \(epoch 2\).*after epoch 1 are in'):
        pretrain(small(Breaks), IMAGES, epochs=4, batch=10, warmup_epochs=1, keep=tmp_path, log=lambda line: None)
    assert all(v.isfinite().all() for v in load_mae(tmp_path, width=32, depth=1, heads=2).state_dict().values())
