"""The encoders of MMLoRA (Table 2): ViT, AudioViT, BERT, DeBERTa and ResNet, each in the arithmetic of its public checkpoint.

Every encoder maps one modality to one feature vector, `forward(x) -> (B, D)`; transformers also give all tokens, `tokens(x) -> (B, T, D)`.
Query, key and value are three nn.Linear everywhere, so that "LoRA on all query, key and value layers" (Sec. 4.1.2) is one match on names.

Shapes in the comments:
    B batch    V views of one sample (frames, clips)    C channels    T tokens    D width    H heads    d = D / H    P relative positions
"""
import torch
from torch import nn
from torch.nn import functional as F


class Encoder(nn.Module):
    """What all encoders share. `width` is the feature's D; `lora_targets`: the layers that LoRA adapts, by how their names end."""

    width: int
    lora_targets: tuple[str, ...]
    image_size = None     # pixels a side, of an encoder of images that takes one size only
    pixels = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)     # mean, std of images: OpenCLIP's (Sec. 4.1.2)

    def train(self, mode=True):
        # Frozen means bit-identical: the same input must give the same feature, during training too. But a frozen parameter is not enough
        # for that: dropout and drop path draw at random in training mode, and BatchNorm moves its running statistics although no gradient
        # reaches them. So an encoder with anything frozen (under LoRA: all but A and B) stays in eval mode, whatever its parent asks.
        return super().train(mode and all(p.requires_grad for p in self.parameters()))


# ---- Transformers: attention, the two kinds of block, and the frame around them ----

class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, Eq. 1), of the tokens `x` over the tokens `context`.

    `bias_kv` (ImageBind) adds one learned key and value that every token may attend to besides the real ones.
    """

    def __init__(self, width, heads, dropout=0.0, bias_kv=False, key_bias=True):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=key_bias)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.bias_k = nn.Parameter(torch.randn(1, 1, width) * 0.02) if bias_kv else None
        self.bias_v = nn.Parameter(torch.randn(1, 1, width) * 0.02) if bias_kv else None

    def forward(self, x, context, mask=None):
        q, k, v = self.query(x), self.key(context), self.value(context)     # (B, T, D) each; q is shorter when x is
        if self.bias_k is not None:
            # Appended after the projections: they are a key and a value themselves, so neither W_k, W_v nor their LoRA acts on them.
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(len(k), -1, -1)], dim=1)     # (B, T + 1, D)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(len(v), -1, -1)], dim=1)
        return self.attend(self.split(q), self.split(k), self.split(v), mask)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B, T, D) -> (B, H, T, d), a view

    def attend(self, q, k, v, mask=None, scale=None):
        # The fused kernel never stores the (T, T) probabilities where it can avoid it. Dropout acts on them, as in the originals.
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, scale=scale)     # (B, H, T, d)
        return self.out(y.transpose(1, 2).flatten(2))     # (B, T, D)


class DisentangledAttention(Attention):
    """Content and relative position as separate vectors (He et al. 2021, DeBERTa, Eq. 4), with R the table of relative positions:

        score[i, j] = (q_i . k_j  +  q_i . K_r[i - j]  +  k_j . Q_r[i - j]) / sqrt(3 d),    K_r = pos_key(R), Q_r = pos_query(R)

    The paper writes the third term at j - i; its code, hence its weights, use i - j in both. sqrt(3 d), since three terms are added.
    `pos_key` and `pos_query` project positions, not tokens: by their names LoRA on `query` and `key` leaves them alone.
    """

    def __init__(self, width, heads, dropout=0.0):
        super().__init__(width, heads, dropout, key_bias=False)
        self.pos_key = nn.Linear(width, width, bias=False)
        self.pos_query = nn.Linear(width, width)

    def forward(self, x, context, mask, relative, index):
        q, k, v = self.split(self.query(x)), self.split(self.key(context)), self.split(self.value(context))     # (B, H, T, d) each
        index = index[:q.shape[2]]     # (queries, T): which row of R belongs to query i and key j
        relative = relative[:q.shape[2] + k.shape[2] - 1]     # (P, D): a first query alone looks no further than distance 0
        relative = F.dropout(relative, self.dropout, self.training)
        pos_k, pos_q = self.split(self.pos_key(relative)[None]), self.split(self.pos_query(relative)[None])     # (1, H, P, d)

        # Two products with all P = 2T - 1 distances, then gather the one that (i, j) needs. Vectors for every pair would be T times larger.
        shape = (len(q), self.heads, -1, -1)
        content_to_position = (q @ pos_k.mT).gather(-1, index.expand(shape))      # (B, H, queries, P) -> (B, H, queries, T)
        position_to_content = (k @ pos_q.mT).gather(-1, index.T.expand(shape)).mT      # (B, H, T, P) -> (B, H, T, queries) -> transposed
        scale = (3 * q.shape[-1]) ** -0.5
        bias = (content_to_position + position_to_content) * scale     # so DeBERTa is ordinary attention with a bias on the scores
        return self.attend(q, k, v, bias.masked_fill(~mask, -torch.inf), scale)


class PreNormBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)): the block of the ViTs. `keep`: compute only the first so many tokens (None: all)."""

    def __init__(self, width, heads, mlp_width, eps, drop_path=0.0, bias_kv=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads, bias_kv=bias_kv)
        self.norm2 = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.drop_path = drop_path

    def forward(self, x, keep=None):
        h = self.norm1(x)
        # contiguous: on strided input torch chooses between two matrix products by requires_grad, and freezing would change the last bit.
        x = x[:, :keep] + self.skip(self.attention(h[:, :keep].contiguous(), h))     # (B, T, D), or (B, keep, D)
        return x + self.skip(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def skip(self, branch):
        """Drop path (Huang et al. 2016): leave a sample's whole branch out at random, and scale the others so that the mean stays."""
        if not self.training or self.drop_path == 0:
            return branch
        # One draw a sample. ImageBind's code draws one per token position and shares it over the batch, because its tensors are (T, B, D)
        # there and timm's DropPath takes the first axis for the batch.
        kept = torch.full((len(branch), 1, 1), 1 - self.drop_path, device=branch.device, dtype=branch.dtype)
        return branch * kept.bernoulli() / kept


class PostNormBlock(nn.Module):
    """LN(x + attention(x)), then LN(x + MLP(x)): the block of BERT and DeBERTa. `keep` as above, the rest goes to the attention."""

    def __init__(self, attention, width, mlp_width, eps, dropout):
        super().__init__()
        self.attention = attention
        self.norm1 = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.norm2 = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, keep=None, **where):
        x = self.norm1(x[:, :keep] + self.dropout(self.attention(x[:, :keep].contiguous(), x, **where)))     # (B, T, D), or (B, keep, D)
        return self.norm2(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class Transformer(Encoder):
    """Embedding, blocks, final norm; the feature is the first token (class token, [CLS]). A subclass brings `embed`, `blocks`, `norm`.

    From scratch, tables and class tokens start as N(0, 0.02) and linear layers as torch makes them, U(+-1/sqrt(in)): std 0.02 at width
    768, like BERT's, and larger where a toy is narrow and needs it.
    """

    lora_targets = ("query", "key", "value")

    def tokens(self, x, keep=None):
        """All tokens after the final norm, (B, T, D); with `keep`, only the first so many come out of the last block."""
        return self.encode(self.embed(x), keep)

    def forward(self, x):
        # A lesson in one argument: nobody reads the last block's other tokens, so do not compute them. The class token still attends to
        # all of them (their keys and values are computed), and no token's query, MLP or norm looks at another's, so the result is
        # exactly tokens(x)[:, 0]. It saves most of one block: 7 % of all operations at depth 12.
        return self.tokens(x, keep=1)[:, 0]     # (B, D)

    def encode(self, x, keep=None, **where):
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, **where)     # (B, T, D)
        return self.norm(last(x, keep, **where))


# ---- Images and spectrograms ----

class ViT(Transformer):
    """Vision Transformer (Dosovitskiy et al. 2021) as the visual tower of OpenCLIP: `forward(images (B, 3, S, S)) -> (B, D)`.

    CLIP's additions: a LayerNorm before the first block (`norm_pre`) and no bias on the patches. The feature is the class token after the
    last LayerNorm; the projection into the space shared with text belongs to CLIP's loss, not to the encoder.
    """

    def __init__(self, image_size, patch_size, width, depth, heads, mlp_ratio=4):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"an image of {image_size} pixels does not divide into patches of {patch_size}")
        self.width, self.image_size = width, image_size
        self.patch = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.cls_token = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Parameter(torch.randn((image_size // patch_size) ** 2 + 1, width) * 0.02)
        self.norm_pre = nn.LayerNorm(width, 1e-5)
        self.blocks = nn.ModuleList(PreNormBlock(width, heads, mlp_ratio * width, 1e-5) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-5)

    def embed(self, x):
        if x.shape[-2:] != (self.image_size, self.image_size):     # the position table fits one size only
            raise ValueError(f"ViT takes images of {self.image_size} x {self.image_size} pixels, got {tuple(x.shape)}")
        x = self.patch(x).flatten(2).mT     # (B, 3, S, S) -> (B, D, h, w) -> (B, h * w, D), row by row
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1)     # (B, T, D), T = h * w + 1
        return self.norm_pre(x + self.positions)


class AudioViT(Transformer):
    """The audio trunk of ImageBind (Girdhar et al. 2023): a ViT over log-mel spectrograms, `forward(mel (B, 1, mels, frames)) -> (B, D)`.

    Its patches overlap (16 wide, every 10) and have a LayerNorm of their own, each block has one learned key and value, and the LayerNorms
    differ in epsilon: 1e-5 for the patches, 1e-6 after. Mel bins are the height, so frames run fastest in the sequence of patches.
    `patch_size` and `stride` may be pairs (mel bins, frames). The channel axis may be left out: (B, mels, frames).
    """

    def __init__(self, width, depth, heads, mel=(128, 204), patch_size=16, stride=10, drop_path=0.0, mlp_ratio=4):
        super().__init__()
        self.width, self.mel = width, tuple(mel)
        self.patch = nn.Conv2d(1, width, patch_size, stride, bias=False)
        self.norm_patch = nn.LayerNorm(width, 1e-5)
        h, w = ((size - p) // s + 1 for size, p, s in zip(mel, self.patch.kernel_size, self.patch.stride))
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, h * w + 1, width) * 0.02)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]     # deeper blocks are left out more often, the first never
        self.blocks = nn.ModuleList(PreNormBlock(width, heads, mlp_ratio * width, 1e-6, rate, bias_kv=True) for rate in rates)
        self.norm = nn.LayerNorm(width, 1e-6)

    def embed(self, x):
        if x.shape[-2:] != self.mel:
            raise ValueError(f"AudioViT takes spectrograms of {self.mel[0]} mel bins x {self.mel[1]} frames, got {tuple(x.shape)}")
        x = x.unsqueeze(1) if x.dim() == 3 else x     # (B, 1, mels, frames)
        x = self.norm_patch(self.patch(x).flatten(2).mT)     # (B, D, h, w) -> (B, h * w, D)
        return torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + self.positions     # (B, T, D), T = h * w + 1


# ---- Text ----

def small_embedding(rows, width):
    return nn.Embedding.from_pretrained(torch.randn(rows, width) * 0.02, freeze=False)     # nn.Embedding's own start is N(0, 1)


def padding_mask(ids, mask=None):
    """(B, T) bool: which tokens are text. Id 0 is padding in both vocabularies."""
    mask = ids != 0 if mask is None else mask.bool()
    first = torch.arange(ids.shape[1], device=ids.device) == 0
    return mask | first     # an empty row still sees its first token: a softmax over no key at all is NaN in some kernels


class BERT(Transformer):
    """BERT (Devlin et al. 2019): `forward(ids (B, T), mask, segments) -> (B, D)`, the pooler's tanh(W x) of [CLS].

    Padding (mask 0) is hidden as a key and nothing else; the outputs at padded places exist but mean nothing. Segments default to 0.
    """

    def __init__(self, vocab_size, width, depth, heads, mlp_width, max_length, dropout=0.1):
        super().__init__()
        self.width, self.max_length = width, max_length
        self.words = small_embedding(vocab_size, width)
        self.positions = small_embedding(max_length, width)
        self.segments = small_embedding(2, width)
        self.norm_embed = nn.LayerNorm(width, 1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(PostNormBlock(Attention(width, heads, dropout), width, mlp_width, 1e-12, dropout) for _ in range(depth))
        self.norm = nn.Identity()     # post-norm blocks end in a LayerNorm already
        self.pooler = nn.Linear(width, width)

    def embed(self, ids, segments=None):
        if ids.shape[1] > self.max_length:
            raise ValueError(f"BERT takes at most {self.max_length} tokens, got {ids.shape[1]}: truncate the text")
        segments = torch.zeros_like(ids) if segments is None else segments
        x = self.words(ids) + self.positions.weight[:ids.shape[1]] + self.segments(segments)     # (B, T, D)
        return self.dropout(self.norm_embed(x))

    def tokens(self, ids, mask=None, segments=None, keep=None):
        return self.encode(self.embed(ids, segments), keep, mask=padding_mask(ids, mask)[:, None, None])     # mask (B, 1, 1, T)

    def forward(self, ids, mask=None, segments=None):
        return torch.tanh(self.pooler(self.tokens(ids, mask, segments, keep=1)[:, 0]))     # (B, D)


class DeBERTa(Transformer):
    """DeBERTa v1 (He et al. 2021): `forward(ids (B, T), mask) -> (B, D)`, the first token.

    BERT with disentangled attention. Words carry no position; every block looks up the distance of each pair of tokens in one table R,
    shared by all blocks. There are no segments: the argument is there so that a text encoder is called one way.
    """

    def __init__(self, vocab_size, width, depth, heads, mlp_width, max_length, dropout=0.1):
        super().__init__()
        self.width, self.max_length = width, max_length
        self.words = small_embedding(vocab_size, width)
        self.norm_embed = nn.LayerNorm(width, 1e-7)
        self.dropout = nn.Dropout(dropout)
        self.relative = small_embedding(2 * max_length, width)     # R: row K + r is distance r, K = max_length
        self.blocks = nn.ModuleList(
            PostNormBlock(DisentangledAttention(width, heads, dropout), width, mlp_width, 1e-7, dropout) for _ in range(depth))
        self.norm = nn.Identity()

    def embed(self, ids, mask):
        return self.dropout(self.norm_embed(self.words(ids)) * mask[..., None])     # (B, T, D), zero where padded

    def tokens(self, ids, mask=None, segments=None, keep=None):
        mask = padding_mask(ids, mask)     # (B, T)
        T, K, place = ids.shape[1], self.max_length, torch.arange(ids.shape[1], device=ids.device)
        # Only distances 1 - T .. T - 1 occur, 2T - 1 of the table's 2K rows. In a text longer than K the far ones share the table's ends.
        distances = torch.arange(1 - T, T, device=ids.device)
        relative = self.relative((distances + K).clamp(0, 2 * K - 1))     # (P, D), P = 2T - 1
        index = place[:, None] - place[None, :] + T - 1     # (T, T): the row of `relative` for distance i - j
        # Only keys are masked. Padded queries attend like any other: their outputs mean nothing, but a fully masked row would be NaN.
        return self.encode(self.embed(ids, mask), keep, mask=mask[:, None, None], relative=relative, index=index)

    def forward(self, ids, mask=None, segments=None):
        return self.tokens(ids, mask, segments, keep=1)[:, 0]     # (B, D)


# ---- Convolutional networks ----

def conv(c_in, c_out, kernel, stride=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)     # no bias: BatchNorm follows and has one


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, Fig. 5 left)."""

    expansion = 1

    def __init__(self, c_in, c, stride, downsample):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c, 3, stride), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = conv(c, c, 3), nn.BatchNorm2d(c)
        self.downsample = downsample

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up beside a shortcut (Fig. 5 right), the stride on the 3x3 as in torchvision's weights (the paper: first 1x1)."""

    expansion = 4

    def __init__(self, c_in, c, stride, downsample):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c, 1), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = conv(c, c, 3, stride), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = conv(c, 4 * c, 1), nn.BatchNorm2d(4 * c)
        self.downsample = downsample

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class ResNet(Encoder):
    """ResNet (He et al. 2016) under torchvision's names: `forward(images (B, C, h, w)) -> (B, D)`, the mean of the last map,
    D = 8 widths, or 32 with `bottleneck`.

    `blocks` counts the blocks of the four stages: (2, 2, 2, 2) is ResNet-18, (3, 8, 36, 3) with `bottleneck` ResNet-152.
    `in_channels`: 3 for images, 20 for a stack of ten optical flow fields, 1 for spectrograms.
    """

    lora_targets = ("conv1", "conv2", "conv3", "downsample.0")
    pixels = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # ImageNet's, which the public weights were trained with

    def __init__(self, blocks, bottleneck, width=64, in_channels=3):
        super().__init__()
        block = Bottleneck if bottleneck else BasicBlock
        self.conv1, self.bn1 = conv(in_channels, width, 7, stride=2), nn.BatchNorm2d(width)
        c_in = width
        for stage, count in enumerate(blocks, start=1):
            c, layers = width * 2 ** (stage - 1), []
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                c_out = c * block.expansion
                # The shortcut needs a projection where the block changes the size: at the head of stages 2 to 4, and of 1 with bottlenecks.
                resize = nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out)) if stride > 1 or c_in != c_out else None
                layers.append(block(c_in, c, stride, resize))
                c_in = c_out
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.width = c_in
        for module in self.modules():
            if isinstance(module, nn.Conv2d):     # keeps the gradients' variance through ReLUs (He et al. 2015)
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def feature_map(self, x):
        """(B, C, h, w) -> (B, D, h / 32, w / 32): the last map, before pooling."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x):
        return self.feature_map(x).mean(dim=(2, 3))     # (B, D)


# ---- Sizes by name ----

BUILD = {     # name: (class, sizes)
    # Public checkpoints exist for these ten (PUBLIC in checkpoints.py)
    "vit_b16": (ViT, dict(image_size=224, patch_size=16, width=768, depth=12, heads=12)),
    "vit_b32": (ViT, dict(image_size=224, patch_size=32, width=768, depth=12, heads=12)),
    "vit_l14": (ViT, dict(image_size=224, patch_size=14, width=1024, depth=24, heads=16)),
    "audio_vit_b": (AudioViT, dict(width=768, depth=12, heads=12, drop_path=0.1)),
    "bert_base": (BERT, dict(vocab_size=30522, width=768, depth=12, heads=12, mlp_width=3072, max_length=512)),
    "bert_large": (BERT, dict(vocab_size=30522, width=1024, depth=24, heads=16, mlp_width=4096, max_length=512)),
    "deberta_base": (DeBERTa, dict(vocab_size=50265, width=768, depth=12, heads=12, mlp_width=3072, max_length=512)),
    "deberta_large": (DeBERTa, dict(vocab_size=50265, width=1024, depth=24, heads=16, mlp_width=4096, max_length=512)),
    "resnet18": (ResNet, dict(blocks=(2, 2, 2, 2), bottleneck=False)),
    "resnet152": (ResNet, dict(blocks=(3, 8, 36, 3), bottleneck=True)),
    # The toy's two towers: 32 x 32 images, 32 mel bins x 64 frames
    "vit_toy": (ViT, dict(image_size=32, patch_size=8, width=32, depth=2, heads=4, mlp_ratio=2)),
    "audio_vit_toy": (AudioViT, dict(width=32, depth=2, heads=4, mel=(32, 64), patch_size=(32, 4), stride=(32, 4), mlp_ratio=2)),
    # Small enough to train from scratch on a laptop
    "vit_small": (ViT, dict(image_size=96, patch_size=12, width=128, depth=4, heads=4)),
    "audio_vit_small": (AudioViT, dict(width=128, depth=4, heads=4, stride=16)),
    "resnet_small": (ResNet, dict(blocks=(2, 2, 2, 2), bottleneck=False, width=16)),
    "bert_small": (BERT, dict(vocab_size=30522, width=128, depth=2, heads=4, mlp_width=512, max_length=512)),
    "deberta_small": (DeBERTa, dict(vocab_size=50265, width=128, depth=2, heads=4, mlp_width=512, max_length=512)),
}


def build(name, **overrides):
    """A freshly initialised encoder by name, sizes replaceable: `build("resnet18", in_channels=20)`. ValueError for an unknown name."""
    if name not in BUILD:
        raise ValueError(f"no encoder is called {name!r}; there are {', '.join(BUILD)}")
    kind, sizes = BUILD[name]
    return kind(**{**sizes, **overrides})


class UnimodalModel(nn.Module):
    """Encoder and linear classifier of one modality, what Eq. 1 trains: `forward(x) -> logits (B, classes)`."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, classes)

    def features(self, x):
        """(B, D). Five axes, (B, V, C, h, w), are V views of each sample (frames, clips): encoded one by one, features averaged."""
        if x.dim() != 5:
            return self.encoder(x)     # images (B, C, h, w), token ids (B, T)
        return self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(dim=1)     # (B * V, D) -> (B, V, D) -> (B, D)

    def forward(self, x):
        return self.head(self.features(x))
