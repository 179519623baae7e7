"Features without training, against timm's own, on tensors and streams."
import pytest
import torch
from conftest import make_photos, random_images, small_encoder

from semmae.core import SemmaeError
from semmae.evaluate import features
from semmae.images import normalize
from semmae.sources import load_images

IMAGES = random_images(7, 32, 32)


@pytest.mark.parametrize('kw', [{}, dict(reg_tokens=2), dict(class_token=False, global_pool='avg')], ids=str)
def test_they_are_timms_tokens_at_those_blocks(kw):
    vit = small_encoder(depth=3, **kw).eval()
    n, pixels = vit.num_prefix_tokens, normalize(IMAGES.float())
    with torch.no_grad():
        peer = vit.forward_intermediates(pixels, indices=[0, 2], norm=True, return_prefix_tokens=True,
                                         output_fmt='NLC', intermediates_only=True)
    patches = torch.cat([vit.fc_norm(x[0] if n else x) for x in peer], 2)
    first = torch.cat([x[1][:, 0] for x in peer], 1) if vit.has_class_token else patches.mean(1)
    want = dict(mean=patches.mean(1), cls=first, none=patches.unflatten(1, (4, 4)))
    for pool, x in want.items():
        assert torch.allclose(features(vit, IMAGES, blocks=(1, 3), pool=pool, batch=3), x, atol=1e-5), pool


def test_the_same_images_have_the_same_features():
    "Whatever state the encoder is in, and in whatever batches they come"
    vit = small_encoder(depth=2, drop_path_rate=.5).train()
    assert torch.equal(features(vit, IMAGES), features(vit, IMAGES))
    assert torch.allclose(features(vit, IMAGES, batch=2), features(vit, IMAGES), atol=1e-5)


def test_streams(tmp_path):
    make_photos(tmp_path)
    vit = small_encoder()
    held, streamed = (load_images(str(tmp_path), ['train'], size=(16, 16), stream=stream)[0].images
                      for stream in (False, True))
    assert torch.equal(features(vit, streamed, batch=9), features(vit, held, batch=9))


def test_what_is_wrong_is_named():
    for kw, named in ((dict(pool='max'), 'pool'), (dict(blocks=(3,)), '2 blocks')):
        with pytest.raises(SemmaeError, match=named):
            features(small_encoder(), IMAGES, **kw)
