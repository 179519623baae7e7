"Invariants of every masking strategy, whatever the parts look like."
import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from semmae.core import SemmaeError, generator
from semmae.masking import CHOICES, STRATEGIES, blend, block, choose, find_strategy, hide_among, inter, intra

# rows, columns, parts, seed
LAYOUTS = st.tuples(st.integers(1, 9), st.integers(2, 9), st.integers(1, 8), st.integers(0, 10**6))


def layout(rows, cols, n, seed, batch=4):
    "Random part maps: some parts empty, some of one patch"
    gen = generator('layout', seed)
    sizes = torch.rand(n, generator=gen)**4 + 1e-9
    return torch.multinomial(sizes, batch*rows*cols, replacement=True,
                             generator=gen).reshape(batch, rows, cols)


def hidden(parts, ids_mask):
    return torch.zeros(len(parts), parts[0].numel()).scatter_(1, ids_mask, 1)


def cuts(parts, out, but=None):
    "How many parts of every image are hidden neither whole nor not at all"
    inside = [parts.flatten(1) == p for p in range(int(parts.max()) + 1) if p != but]
    return (torch.stack([((out*i).sum(1) > 0) & ((out*i).sum(1) < i.sum(1)) for i in inside]).sum(0)
            if inside else torch.zeros(len(parts)))


@pytest.mark.parametrize('name', STRATEGIES)
@settings(deadline=None, max_examples=60)
@given(LAYOUTS, st.floats(.05, .95), st.floats(0, 1))
def test_every_patch_once_and_the_same_number_hidden(name, shape, ratio, progress):
    parts = layout(*shape)
    L = parts[0].numel()
    n = L - int(L*(1-ratio))
    if not 0 < n < L:
        return
    x = parts.float() if STRATEGIES[name].guide == 'scores' else parts
    keep, mask = STRATEGIES[name](x, ratio, generator(name, shape), progress)
    assert mask.shape == (len(parts), n)
    assert (torch.cat([keep, mask], 1).sort(1).values == torch.arange(L)).all()


@settings(deadline=None, max_examples=60)
@given(LAYOUTS, st.floats(.1, .9))
def test_intra_hides_the_same_share_of_every_part(shape, ratio):
    parts = layout(*shape)
    L = parts[0].numel()
    n = L - int(L*(1-ratio))
    if not 0 < n < L:
        return
    out = hidden(parts, intra(parts, ratio, generator(shape))[1])
    for p in range(int(parts.max()) + 1):
        inside = parts.flatten(1) == p
        assert ((out*inside).sum(1) - inside.sum(1)*n/L).abs().max() < 1


@settings(deadline=None, max_examples=60)
@given(LAYOUTS, st.floats(.1, .9))
def test_inter_cuts_at_most_one_part(shape, ratio):
    parts = layout(*shape)
    L = parts[0].numel()
    if not 0 < L - int(L*(1-ratio)) < L:
        return
    assert (cuts(parts, hidden(parts, inter(parts, ratio, generator(shape))[1])) <= 1).all()


def mean_of_inter(sizes, n):
    "What inter hides of every part, the mean over all orders of the parts"
    total = [0]*len(sizes)
    orders = list(itertools.permutations(range(len(sizes))))
    for order in orders:
        left = n
        for p in order:
            total[p] += min(sizes[p], left)
            left -= min(sizes[p], left)
    return torch.tensor(total)/len(orders)


@pytest.mark.parametrize('progress', [0, .25, .5, .75, 1])
@pytest.mark.parametrize('gamma', [1/3, 1, 2, 3])
@pytest.mark.parametrize('reverse', [False, True])
def test_blend_hides_what_the_papers_formula_says(progress, gamma, reverse):
    "λ·r·K + (1−λ)·(what inter hides of the part on average), λ = 1 − progress^γ, or progress^γ in reverse"
    sizes, n = [30, 20, 10, 4], 48
    parts = torch.tensor(sum(([p]*k for p, k in enumerate(sizes)), [])).reshape(1, 8, 8).expand(8000, -1, -1)
    share = progress**gamma if reverse else 1 - progress**gamma
    want = share*torch.tensor(sizes)*n/64 + (1 - share)*mean_of_inter(sizes, n)
    out = hidden(parts, blend(parts, .75, generator(progress), progress, gamma=gamma, reverse=reverse)[1])
    got = torch.stack([out[:, parts[0].flatten() == p].sum(1).mean() for p in range(4)])
    assert (got - want).abs().max() < .25


@pytest.mark.parametrize('f', [intra, inter, blend])
def test_choice_inside_a_part_is_uniform(f):
    parts = torch.tensor([0]*30 + [1]*20 + [2]*10 + [3]*4).reshape(1, 8, 8).expand(8000, -1, -1)
    share = hidden(parts, f(parts, .75, generator(f.__name__), .5)[1]).mean(0)
    for p in range(4):
        inside = share[parts[0].flatten() == p]
        assert (inside - inside.mean()).abs().max() < .03


@settings(deadline=None, max_examples=60)
@given(LAYOUTS, st.floats(.1, .9), st.floats(0, 1), st.integers(0, 8))
def test_a_spared_background_is_never_hidden_whole(shape, ratio, progress, background):
    "By value, and also where it fills the image or is one patch; the others are cut once at most at inter"
    parts = layout(*shape)
    L = parts[0].numel()
    n = L - int(L*(1-ratio))
    if not 0 < n < L:
        return
    inside = parts.flatten(1) == background
    for f, kw in ((inter, {}), (intra, {}), (blend, dict(progress=progress))):
        keep, mask = f(parts, ratio, generator(shape), background=background, **kw)
        assert (torch.cat([keep, mask], 1).sort(1).values == torch.arange(L)).all() and mask.shape[1] == n
        out = hidden(parts, mask)
        assert ((out*inside).sum(1) < inside.sum(1))[inside.any(1)].all()
        assert ((out*inside).sum(1) >= torch.minimum((inside.sum(1)*n/L).floor(),
                                                     inside.sum(1) - 1))[inside.any(1)].all()
        if f is inter:
            assert (cuts(parts, out, but=background) <= 1).all()


@pytest.mark.parametrize('name', STRATEGIES)
def test_hidden_patches_come_in_random_order(name):
    "Any first few of them are a uniform sample: what a decoder that predicts a share relies on"
    parts = torch.tensor([0]*30 + [1]*20 + [2]*10 + [3]*4).reshape(1, 8, 8).expand(6000, -1, -1)
    x = parts.float() if STRATEGIES[name].guide == 'scores' else parts
    mask = STRATEGIES[name](x, .5, generator(name))[1]
    some, every = (hidden(parts, ids).mean(0) for ids in (mask[:, :8], mask))
    assert (some*4 - every).abs().max() < .1


def test_labels_the_strategies_cannot_use():
    for bad, named in ((torch.rand(2, 4, 4), 'part'), (torch.full((2, 4, 4), 256), '256'),
                       (torch.full((2, 4, 4), -1), '-1')):
        with pytest.raises(SemmaeError, match=named):
            blend(bad, .75, generator(0))


@pytest.mark.parametrize('f', [intra, inter, blend])
def test_the_width_of_the_table_of_counts_changes_nothing(f):
    "On a GPU it is as wide as labels can be, so that nobody has to look at them"
    parts = layout(6, 7, 5, 0, batch=20)
    more = torch.cat([parts, torch.full_like(parts[:1], 255)])
    for a, b in zip(f(parts, .6, generator(0, rows=(0, 21)), .5), f(more, .6, generator(0), .5)):
        assert torch.equal(a, b[:20])


def test_blocks_are_rectangles():
    "Hidden patches have hidden neighbours, and every ratio is reached without scatter"
    for ratio in (.3, .75, .9):
        out = hidden(torch.zeros(500, 14, 14),
                     block(torch.zeros(500, 14, 14), ratio, generator(ratio))[1]).reshape(-1, 14, 14)
        around = torch.nn.functional.avg_pool2d(out[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
        # nearly alone: the rim of the rectangle that was cut
        assert ((around < .3)*out).sum()/out.sum() < .04
        assert (out.mean(0) - ratio).abs().max() < .15, 'a place is preferred'


@pytest.mark.parametrize('by', CHOICES)
@pytest.mark.parametrize('name', ['random', 'blend', 'attention_high'])
def test_masks_among_a_share_of_the_patches(by, name):
    "Every chosen patch once, no other; what a process draws for its rows is what is drawn for all"
    parts = layout(6, 7, 5, 1, batch=30)
    views = dict(parts=parts, scores=parts.float(), **{'None': parts})
    hide = find_strategy(name, .75)
    of = lambda guide, rows: views[str(guide)][rows]
    def masks(rows, at=None):
        some = choose(of(CHOICES[by][0], rows), by, .5, generator('choice', rows=at))
        return some, *hide_among(hide, some, of(hide.guide, rows), generator('masks', rows=at), .5)
    some, keep, mask = masks(slice(0, 30))
    assert some.shape == (30, 21) and mask.shape == (30, 16)
    assert (torch.cat([keep, mask], 1).sort(1).values == some.sort(1).values).all()
    assert (some.sort(1).values.diff(dim=1) > 0).all()
    for all_rows, own in zip((some, keep, mask), masks(slice(10, 20), (10, 30)), strict=True):
        assert torch.equal(all_rows[10:20], own)


def test_the_choice_prefers_what_its_name_says():
    parts = layout(6, 7, 5, 1, batch=30)
    front = (parts > 0).flatten(1)
    inside = front.gather(1, choose(parts, 'foreground', .5, generator(0)))
    assert (inside.sum(1) == front.sum(1).clamp(max=21)).all()
    scores = torch.rand(30, 6, 7, generator=generator('scores'))
    some = choose(scores, 'attention', .5, generator(0))
    least, rest = scores.flatten(1).gather(1, some).amin(1), scores.flatten(1).scatter(1, some, 0).amax(1)
    assert (least > rest).all()
