"What a step sees is a function of (seed, step), through a resume and on any number of processes."
import math

import pytest
import torch
from conftest import random_images, small_encoder

from semmae.core import SemmaeError, generator, patchify
from semmae.images import unnormalize
from semmae.mae import MAE
from semmae.masking import STRATEGIES, strategy
from semmae.pretrain import Batches, pretrain

IMAGES = random_images(40, 32, 48)
GUIDES = {'parts': torch.randint(0, 5, (40, 9, 7), dtype=torch.uint8, generator=generator('maps')),
          'scores': torch.rand(40, 9, 7, generator=generator('scores')), None: None}


def batches(name, **kw):
    return Batches(IMAGES, (4, 6), GUIDES[STRATEGIES[name].guide], dict(name=name, ratio=.75),
                   epochs=4, batch=10, **kw)


@pytest.mark.parametrize('name', STRATEGIES)
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(name):
    through = batches(name)
    seen = [through[step] for step in range(through.steps)]
    for step in (0, 7, 15):
        for a, b in zip(batches(name)[step], seen[step]):
            assert torch.equal(a, b)


@pytest.mark.parametrize('name', STRATEGIES)
@pytest.mark.parametrize('ranks', [2, 3, 10])
def test_processes_share_the_batch_of_one(name, ranks):
    "Order, crops and masks exactly; pixels but for the order of sums. 3 does not divide the batch"
    for step in (0, 13):
        shares = [batches(name).at(step, r, ranks) for r in range(ranks)]
        imgs, keep, mask = (torch.cat(x) for x in zip(*shares))
        whole = batches(name)[step]
        assert torch.equal(keep, whole[1]) and torch.equal(mask, whole[2])
        assert torch.allclose(imgs, whole[0], atol=1e-5)


def test_progress_is_the_step_counter():
    seen = []
    try:
        @strategy()
        def spy(x, ratio, gen, progress=0.):
            seen.append(progress)
            return STRATEGIES['random'](x, ratio, gen)
        run = batches('spy')
        seen.clear()
        for step in (0, 4, 8, 15):
            run[step]
        assert seen == [0, .25, .5, 15/16]
    finally:
        STRATEGIES.pop('spy', None)


@pytest.mark.parametrize('kind', ['parts', 'scores'])
def test_maps_follow_their_images(kind):
    "Through every crop and flip a patch keeps the label, or the score, of the colour that it shows"
    labels = torch.nn.functional.interpolate(torch.rand(40, 3, 3, 4, generator=generator('painted')),
                                             (8, 12), mode='bicubic').argmax(1)
    scores = torch.nn.functional.interpolate(torch.rand(40, 1, 3, 4, generator=generator('painted')),
                                             (8, 12), mode='bilinear')[:, 0]
    maps = (torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float() if kind == 'parts'
            else scores[:, None].expand(-1, 3, -1, -1))
    images = (maps.repeat_interleave(4, 2).repeat_interleave(4, 3)*255).to(torch.uint8)
    seen = []
    try:
        @strategy(kind)
        def spy(x, ratio, gen, progress=0.):
            seen.append(x)
            return STRATEGIES['random'](x, ratio, gen)
        painted = Batches(images, (4, 6), labels.byte() if kind == 'parts' else scores,
                          dict(name='spy', ratio=.5), epochs=2, batch=40)
        for step in (0, 1):
            colour = patchify(unnormalize(painted[step][0]).float()/255, 8).unflatten(2, (64, 3)).mean(2)
            if kind == 'parts':
                first, second = colour.topk(2).values.unbind(2)
                assert (seen[-1].flatten(1) == colour.argmax(2))[first - second > .1].all()
            else:
                assert (seen[-1].flatten(1) - colour.mean(2)).abs().mean() < .02
    finally:
        STRATEGIES.pop('spy', None)


def test_labels_with_gaps_keep_their_names():
    "A map of 0, 7 and 255 is as good as one of 0, 1 and 2, and an option names the label as the map does"
    names = torch.tensor([0, 7, 255], dtype=torch.uint8)
    maps = torch.randint(0, 3, (40, 9, 7), generator=generator('maps'))
    for name, options in (('intra', {}), ('inter', {})):
        for bg in ({}, dict(background=2)):
            of = lambda m, **kw: Batches(IMAGES, (4, 6), m, dict(name=name, ratio=.75, **kw),
                                         epochs=1, batch=10)
            dense, gaps = of(maps, **bg), of(names[maps], **({k: int(names[v]) for k, v in bg.items()}))
            assert gaps.guide.values.tolist() == [0, 7, 255]
            assert torch.equal(dense.guide.maps, gaps.guide.maps)
            for step in range(4):
                assert gaps[step][2].shape == dense[step][2].shape
            if name == 'intra':
                assert torch.equal(dense[0][2], gaps[0][2])


def test_seeds_and_steps_differ():
    assert (not torch.equal(batches('blend')[0][2], batches('blend', seed=1)[0][2])
            and not torch.equal(batches('blend')[0][2], batches('blend')[1][2]))


def small(cls=MAE):
    return cls(small_encoder(image=(32, 48), depth=1), width=32, depth=1, heads=2)


def test_a_bad_loss_names_its_step_and_keeps_the_last_good_checkpoint(tmp_path):
    class Breaks(MAE):
        steps = 0
        def forward(self, *args):
            self.steps += 1
            loss, pred = super().forward(*args)
            return loss*(math.inf if self.steps == 10 else 1.), pred
    mae, good = small(Breaks), []
    log = lambda line: good.append({k: v.clone() for k, v in mae.state_dict().items()})
    with pytest.raises(SemmaeError, match=fr'step 10 .*pretrain.lr.*{tmp_path}/state.pt'):
        pretrain(mae, IMAGES, epochs=4, batch=10, warmup_epochs=1, checkpoint=tmp_path/'state.pt', log=log)
    kept = torch.load(tmp_path/'state.pt')['mae']
    assert len(good) == 2 and all(torch.equal(good[-1][k], kept[k]) for k in kept)


def test_weights_that_broke_in_the_last_step_of_an_epoch_are_not_kept(tmp_path):
    class Breaks(MAE):
        steps = 0
        def forward(self, *args):
            self.steps += 1
            loss, pred = super().forward(*args)
            if self.steps == 8:
                loss.register_hook(lambda g: g*float('nan'))  # a good loss with a bad gradient
            return loss, pred
    with pytest.raises(SemmaeError, match='step 8 .*pretrain.lr'):
        pretrain(small(Breaks), IMAGES, epochs=4, batch=10, warmup_epochs=1,
                 checkpoint=tmp_path/'state.pt', log=lambda line: None)
    assert all(v.isfinite().all() for v in torch.load(tmp_path/'state.pt')['mae'].values())


@pytest.mark.parametrize('wrong', [dict(batch=9), dict(accumulate=3), dict(compile='graph')], ids=str)
def test_what_does_not_go_with_these_images_or_this_machine_is_named(wrong):
    with pytest.raises(SemmaeError, match=f'pretrain.{next(iter(wrong))}'):
        pretrain(small(), IMAGES[:8], **dict(epochs=1, batch=2, warmup_epochs=0) | wrong)


def test_a_batch_smaller_than_the_processes_is_named():
    with pytest.raises(SemmaeError, match='pretrain.batch'):
        batches('random').at(0, 0, 11)
