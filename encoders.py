"""The encoders of MMLoRA (Table 2): ViT, AudioViT, BERT, DeBERTa and ResNet.

Every encoder turns one modality into one feature vector: `forward(x) -> (B, D)`. A transformer also
gives all its tokens: `tokens(x) -> (B, T, D)`. Each computes exactly what its public checkpoint was
trained with (`pretrained.checkpoints` loads it). Query, key and value are three nn.Linear in every
transformer, so "LoRA on all Query, Key, and Value layers" (Sec. 4.1.2) is a match on three names.

To know one encoder, read Attention, PreNormBlock, Transformer and ViT. The others differ little.

Shapes in the comments:
    B batch    V views of one sample (frames, clips)    C channels    T tokens
    D width    H heads    d = D / H    P relative positions
"""
import torch
from torch import nn
from torch.nn import functional as F


class Encoder(nn.Module):
    """What all encoders share: a few facts that other files ask for, and a rule for `train()`."""

    width: int                       # D, the length of the feature
    lora_targets: tuple[str, ...]    # LoRA adapts the layers whose names end like this
    tokenizer = None                 # of a text encoder: the kind of tokenizer whose ids it reads
    image_size = None                # of a ViT: pixels a side; it takes no other size

    # Mean and standard deviation of the images, per colour: OpenCLIP's (Sec. 4.1.2).
    pixels = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def train(self, mode=True):
        # A frozen encoder must give the same feature for the same input, during training too.
        # Frozen parameters are not enough for that: in training mode, dropout and drop path draw
        # at random, and BatchNorm moves its running statistics without any gradient. So an encoder
        # with a frozen parameter stays in eval mode, whatever its parent asks. Under LoRA that is
        # always so: all parameters but A and B are frozen.
        nothing_frozen = all(p.requires_grad for p in self.parameters())
        return super().train(mode and nothing_frozen)


# ---- Transformers: attention, the two kinds of block, and the frame around them ----

class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, Eq. 1).

    The tokens `x` ask, the tokens `context` answer. `bias_kv` (ImageBind) adds one learned key and
    one learned value; every token may attend to them as to one more token.
    """

    def __init__(self, width, heads, dropout=0.0, bias_kv=False, key_bias=True):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=key_bias)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.bias_k = nn.Parameter(torch.randn(1, 1, width) * 0.02) if bias_kv else None
        self.bias_v = nn.Parameter(torch.randn(1, 1, width) * 0.02) if bias_kv else None

    def forward(self, x, context, mask=None):
        q = self.query(x)          # (B, T, D), with fewer tokens where x has fewer
        k = self.key(context)      # (B, T, D)
        v = self.value(context)    # (B, T, D)
        if self.bias_k is not None:
            # They join after the projections: they are a key and a value already.
            # So neither W_k and W_v nor the LoRA on them acts on these two.
            bias_k = self.bias_k.to(k.dtype).expand(len(k), -1, -1)    # (B, 1, D)
            bias_v = self.bias_v.to(v.dtype).expand(len(v), -1, -1)    # (B, 1, D)
            k = torch.cat([k, bias_k], dim=1)                          # (B, T + 1, D)
            v = torch.cat([v, bias_v], dim=1)                          # (B, T + 1, D)
        return self.attend(self.split(q), self.split(k), self.split(v), mask)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)    # (B, T, D) -> (B, H, T, d)

    def attend(self, q, k, v, mask=None, scale=None):
        # Where it can, the fused kernel never stores the (T, T) attention probabilities.
        # Dropout acts on these probabilities, as in the original models.
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)    # (B, H, T, d)
        return self.out(y.transpose(1, 2).flatten(2))                              # (B, T, D)


class DisentangledAttention(Attention):
    """Content and relative position as separate vectors (He et al. 2021, DeBERTa, Eq. 4).

        score[i, j] = (q_i . k_j  +  q_i . K_r[i - j]  +  k_j . Q_r[i - j]) / sqrt(3 d)
        K_r = pos_key(R),  Q_r = pos_query(R),  R: the table of relative positions

    The paper has j - i in the third term. Its code, and so its weights, have i - j in both.
    The root is of 3 d because there are three terms.
    `pos_key` and `pos_query` project positions, not tokens. LoRA finds its layers by their names,
    `query` and `key`, so it leaves these two alone.
    """

    def __init__(self, width, heads, dropout=0.0):
        super().__init__(width, heads, dropout, key_bias=False)
        self.pos_key = nn.Linear(width, width, bias=False)
        self.pos_query = nn.Linear(width, width)

    def forward(self, x, context, mask, relative, index):
        q = self.split(self.query(x))          # (B, H, queries, d)
        k = self.split(self.key(context))      # (B, H, T, d)
        v = self.split(self.value(context))    # (B, H, T, d)

        # relative: the rows of R for the distances 1 - T .. T - 1. index[i, j]: the row for query i
        # and key j. Where x has fewer tokens than context, the last rows of both are not needed.
        queries, T = q.shape[2], k.shape[2]
        index = index[:queries]                               # (T, T) -> (queries, T)
        relative = relative[:queries + T - 1]                 # (2T - 1, D) -> (P, D)
        relative = F.dropout(relative, self.dropout, self.training)
        pos_k = self.split(self.pos_key(relative)[None])      # (1, H, P, d)
        pos_q = self.split(self.pos_query(relative)[None])    # (1, H, P, d)

        # Multiply by all P distances, then gather the one that each pair (i, j) needs.
        # A position vector for every pair would take T times the memory.
        pairs = (len(q), self.heads, -1, -1)
        c2p = (q @ pos_k.mT).gather(-1, index.expand(pairs))      # (B, H, queries, P -> T)
        p2c = (k @ pos_q.mT).gather(-1, index.T.expand(pairs))    # (B, H, T, P -> queries)

        # So DeBERTa is ordinary attention with a bias on the scores.
        scale = (3 * q.shape[-1]) ** -0.5
        bias = (c2p + p2c.mT) * scale                             # (B, H, queries, T)
        bias = bias.masked_fill(~mask, -torch.inf)
        return self.attend(q, k, v, bias, scale)


def quick_gelu(x):
    """x sigmoid(1.702 x), nearly GELU. OpenAI, DFN and MetaCLIP trained their ViTs with it."""
    return x * torch.sigmoid(1.702 * x)


class PreNormBlock(nn.Module):
    """The block of the ViTs: x + attention(LN(x)), then x + MLP(LN(x)).

    `keep`: return only the first so many tokens (None: all).
    """

    def __init__(self, width, heads, mlp_width, eps, drop_path=0.0, bias_kv=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads, bias_kv=bias_kv)
        self.norm2 = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.activation = F.gelu
        self.drop_path = drop_path

    def forward(self, x, keep=None):
        h = self.norm1(x)
        # contiguous(): for strided input, torch chooses between two matrix products by
        # requires_grad. Without it, freezing the layer would change the last bit of the result.
        h = self.attention(h[:, :keep].contiguous(), h)
        x = x[:, :keep] + self.skip(h)           # (B, T, D), or (B, keep, D)
        h = self.fc2(self.activation(self.fc1(self.norm2(x))))
        return x + self.skip(h)

    def skip(self, branch):
        """Drop path (Huang et al. 2016): in training, leave out the whole branch of some samples.

        The branch of the other samples is scaled up, so that the mean stays the same.
        """
        if not self.training or self.drop_path == 0:
            return branch
        # One draw a sample. ImageBind's code draws one a token position, the same for all samples:
        # its tensors are (T, B, D), and timm's DropPath takes the first axis for the batch.
        shape = (len(branch), 1, 1)
        kept = torch.full(shape, 1 - self.drop_path, device=branch.device, dtype=branch.dtype)
        return branch * kept.bernoulli() / kept


class PostNormBlock(nn.Module):
    """The block of BERT and DeBERTa: LN(x + attention(x)), then LN(x + MLP(x)).

    `keep` as in PreNormBlock; the attention gets all other arguments.
    """

    def __init__(self, attention, width, mlp_width, eps, dropout):
        super().__init__()
        self.attention = attention
        self.norm1 = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.norm2 = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, keep=None, **where):
        h = x[:, :keep] + self.dropout(self.attention(x[:, :keep].contiguous(), x, **where))
        x = self.norm1(h)                        # (B, T, D), or (B, keep, D)
        h = self.fc2(F.gelu(self.fc1(x)))
        return self.norm2(x + self.dropout(h))


class Transformer(Encoder):
    """Embedding, blocks, final norm. The feature is the first token (class token, [CLS]).

    A subclass brings `embed`, `blocks` and `norm`. From scratch, tables and class tokens start with
    standard deviation 0.02, and linear layers as torch makes them, uniform in +-1/sqrt(in).
    At width 768 that is a standard deviation of 0.02 as well (BERT's); a narrow toy needs more.
    """

    lora_targets = ("query", "key", "value")

    def tokens(self, x, keep=None):
        """All tokens after the final norm, (B, T, D). With `keep`, only the first so many."""
        return self.encode(self.embed(x), keep)

    def forward(self, x):
        # Nobody reads the other tokens of the last block, so keep=1 does not compute them. The
        # first token still attends to all of them: their keys and values are computed. Nothing else
        # mixes tokens, since query, MLP and norm act on each token alone. So the result is exactly
        # tokens(x)[:, 0], with 7 % fewer operations at depth 12.
        return self.tokens(x, keep=1)[:, 0]      # (B, D)

    def encode(self, x, keep=None, **where):
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, **where)                # (B, T, D)
        return self.norm(last(x, keep, **where))


# ---- Images and spectrograms ----

class ViT(Transformer):
    """Vision Transformer (Dosovitskiy et al. 2021) as in OpenCLIP: `forward(images (B, 3, S, S))`.

    CLIP adds a LayerNorm before the first block (`norm_pre`) and has no bias on the patches. The
    feature is the class token after the last LayerNorm. CLIP then projects it into a space shared
    with text; that projection belongs to CLIP's loss, not to the encoder. `quick_gelu`: some public
    weights need this activation (`pretrained.checkpoints` knows which).
    """

    def __init__(self, image_size, patch_size, width, depth, heads, mlp_ratio=4, quick_gelu=False):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"an image of {image_size} pixels does not divide into patches"
                             f" of {patch_size}")
        self.width, self.image_size = width, image_size
        patches = (image_size // patch_size) ** 2
        self.patch = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.cls_token = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Parameter(torch.randn(patches + 1, width) * 0.02)
        self.norm_pre = nn.LayerNorm(width, 1e-5)
        self.blocks = nn.ModuleList(
            PreNormBlock(width, heads, mlp_ratio * width, eps=1e-5) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-5)
        if quick_gelu:
            self.use_quick_gelu()

    def use_quick_gelu(self):
        for block in self.blocks:
            block.activation = quick_gelu

    def embed(self, x):
        S = self.image_size
        if x.shape[-2:] != (S, S):               # the table of positions fits one size only
            raise ValueError(f"ViT takes images of {S} x {S} pixels, got {tuple(x.shape)}")
        x = self.patch(x).flatten(2).mT          # (B, D, h, w) -> (B, h * w, D), row by row
        cls = self.cls_token.expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1)           # (B, T, D), T = 1 + h * w
        return self.norm_pre(x + self.positions)


class AudioViT(Transformer):
    """The audio trunk of ImageBind (Girdhar et al. 2023): a ViT over log-mel spectrograms.

    `forward(mel (B, 1, mels, frames))`, or without the channel axis, (B, mels, frames). The patches
    overlap (16 wide, one every 10) and have a LayerNorm of their own, each block has one learned
    key and value, and epsilon is 1e-5 for the patches, 1e-6 after. Mel bins are the height, so
    frames run fastest in the sequence of patches. `patch_size` and `stride` may be pairs (mel bins,
    frames).

    `drop_path` is how often the last block leaves out a branch; earlier blocks do it less often. It
    acts in every training of all weights (step 1, full fine-tuning, joint baselines), not under
    LoRA, where the encoder is in eval mode. `build("audio_vit_b", drop_path=0.0)` switches it off.
    """

    def __init__(self, width, depth, heads, mel=(128, 204), patch_size=16, stride=10, drop_path=0.0,
                 mlp_ratio=4):
        super().__init__()
        self.width, self.mel = width, tuple(mel)
        self.patch = nn.Conv2d(1, width, patch_size, stride, bias=False)
        self.norm_patch = nn.LayerNorm(width, 1e-5)
        h = (mel[0] - self.patch.kernel_size[0]) // self.patch.stride[0] + 1
        w = (mel[1] - self.patch.kernel_size[1]) // self.patch.stride[1] + 1
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, h * w + 1, width) * 0.02)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            rate = drop_path * i / max(depth - 1, 1)      # from 0 up to drop_path in the last block
            block = PreNormBlock(width, heads, mlp_ratio * width, 1e-6, rate, bias_kv=True)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(width, 1e-6)

    def embed(self, x):
        if x.shape[-2:] != self.mel:
            raise ValueError(f"AudioViT takes spectrograms of {self.mel[0]} mel bins x"
                             f" {self.mel[1]} frames, got {tuple(x.shape)}")
        if x.dim() == 3:
            x = x.unsqueeze(1)                   # (B, 1, mels, frames)
        x = self.patch(x).flatten(2).mT          # (B, D, h, w) -> (B, h * w, D)
        x = self.norm_patch(x)
        cls = self.cls_token.expand(len(x), 1, -1)
        return torch.cat([cls, x], dim=1) + self.positions      # (B, T, D), T = 1 + h * w


# ---- Text ----

def small_embedding(rows, width):
    # nn.Embedding's own start has standard deviation 1.
    return nn.Embedding.from_pretrained(torch.randn(rows, width) * 0.02, freeze=False)


def padding_mask(ids, mask=None):
    """(B, T) bool: which tokens are text. Id 0 is padding in both vocabularies."""
    if mask is None:
        mask = ids != 0
    # The first token always counts: a softmax over no key at all is NaN in some kernels.
    first = torch.arange(ids.shape[1], device=ids.device) == 0
    return mask.bool() | first


class BERT(Transformer):
    """BERT (Devlin et al. 2019): `forward(ids (B, T), mask, segments)`, segments 0 by default.

    The feature is the pooler's output, tanh(W x) of [CLS]. The mask hides padding as a key and does
    nothing else: outputs at padded places exist, but mean nothing.
    """

    tokenizer = "wordpiece"

    def __init__(self, vocab_size, width, depth, heads, mlp_width, max_length, dropout=0.1):
        super().__init__()
        self.width, self.max_length = width, max_length
        self.words = small_embedding(vocab_size, width)
        self.positions = small_embedding(max_length, width)
        self.segments = small_embedding(2, width)
        self.norm_embed = nn.LayerNorm(width, 1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            attention = Attention(width, heads, dropout)
            self.blocks.append(PostNormBlock(attention, width, mlp_width, 1e-12, dropout))
        self.norm = nn.Identity()                # a post-norm block ends in a LayerNorm already
        self.pooler = nn.Linear(width, width)

    def embed(self, ids, segments=None):
        T = ids.shape[1]
        if T > self.max_length:
            raise ValueError(f"BERT takes at most {self.max_length} tokens, got {T}:"
                             " truncate the text")
        if segments is None:
            segments = torch.zeros_like(ids)
        x = self.words(ids) + self.positions.weight[:T] + self.segments(segments)     # (B, T, D)
        return self.dropout(self.norm_embed(x))

    def tokens(self, ids, mask=None, segments=None, keep=None):
        mask = padding_mask(ids, mask)[:, None, None]      # (B, 1, 1, T): the same for all queries
        return self.encode(self.embed(ids, segments), keep, mask=mask)

    def forward(self, ids, mask=None, segments=None):
        cls = self.tokens(ids, mask, segments, keep=1)[:, 0]
        return torch.tanh(self.pooler(cls))                # (B, D)


class DeBERTa(Transformer):
    """DeBERTa v1 (He et al. 2021): `forward(ids (B, T), mask)`. The feature is the first token.

    It is BERT with disentangled attention. Words carry no position: every block looks up the
    distance of each pair of tokens in one table R, which all blocks share. There are no segments;
    the argument exists so that both text encoders are called in one way.
    """

    tokenizer = "byte_bpe"

    def __init__(self, vocab_size, width, depth, heads, mlp_width, max_length, dropout=0.1):
        super().__init__()
        self.width, self.max_length = width, max_length
        self.words = small_embedding(vocab_size, width)
        self.norm_embed = nn.LayerNorm(width, 1e-7)
        self.dropout = nn.Dropout(dropout)
        self.relative = small_embedding(2 * max_length, width)      # R: row K + r is for distance r
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            attention = DisentangledAttention(width, heads, dropout)
            self.blocks.append(PostNormBlock(attention, width, mlp_width, 1e-7, dropout))
        self.norm = nn.Identity()                # a post-norm block ends in a LayerNorm already

    def embed(self, ids, mask):
        x = self.norm_embed(self.words(ids)) * mask[..., None]      # (B, T, D), zero where padded
        return self.dropout(x)

    def tokens(self, ids, mask=None, segments=None, keep=None):
        mask = padding_mask(ids, mask)           # (B, T)
        T, K = ids.shape[1], self.max_length
        # Of the 2K rows of R, T tokens need 2T - 1: the distances 1 - T .. T - 1.
        # In a text longer than K, all distances beyond the table share its first or last row.
        distances = torch.arange(1 - T, T, device=ids.device)
        relative = self.relative((distances + K).clamp(0, 2 * K - 1))      # (2T - 1, D)
        place = torch.arange(T, device=ids.device)
        index = place[:, None] - place[None, :] + T - 1      # (T, T): the row of distance i - j
        # The mask hides keys only. A padded query attends like any other, and its output means
        # nothing. Without any key it would be NaN.
        where = dict(mask=mask[:, None, None], relative=relative, index=index)
        return self.encode(self.embed(ids, mask), keep, **where)

    def forward(self, ids, mask=None, segments=None):
        return self.tokens(ids, mask, segments, keep=1)[:, 0]       # (B, D)


# ---- Convolutional networks ----

def conv(c_in, c_out, kernel, stride=1):
    # No bias: a BatchNorm follows and has one.
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)


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
    """1x1 down, 3x3, 1x1 up beside a shortcut (He et al. 2016, Fig. 5 right).

    The 3x3 has the stride, as in torchvision's weights. The paper gives it to the first 1x1.
    """

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
    """ResNet (He et al. 2016) under torchvision's names: `forward(images (B, C, h, w))`.

    The feature is the mean of the last map, D = 8 * width, or 32 * width with `bottleneck`.
    `blocks` counts the blocks of the four stages: (2, 2, 2, 2) is ResNet-18, (3, 8, 36, 3) with
    `bottleneck` is ResNet-152. `in_channels`: 3 for images, 20 for a stack of ten optical flow
    fields, 1 for spectrograms.
    """

    lora_targets = ("conv1", "conv2", "conv3", "downsample.0")
    # ImageNet's, as the public weights expect. The paper names OpenCLIP's only.
    pixels = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, blocks, bottleneck, width=64, in_channels=3):
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, width, 7, stride=2), nn.BatchNorm2d(width)
        block = Bottleneck if bottleneck else BasicBlock
        c_in = width
        for stage, count in enumerate(blocks, start=1):
            c = width * 2 ** (stage - 1)
            c_out = c * block.expansion
            layers = []
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                downsample = None
                if stride > 1 or c_in != c_out:
                    # The block changes the size, so its shortcut needs a projection: at the head
                    # of stages 2 to 4 and, with bottlenecks, of stage 1.
                    downsample = nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))
                layers.append(block(c_in, c, stride, downsample))
                c_in = c_out
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.width = c_in
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # This keeps the variance of the gradients through ReLUs (He et al. 2015).
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def feature_map(self, x):
        """(B, C, h, w) -> (B, D, h / 32, w / 32): the last map, before pooling."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x):
        return self.feature_map(x).mean(dim=(2, 3))      # (B, D)


# ---- Sizes by name ----

BASE = dict(width=768, depth=12, heads=12)
LARGE = dict(width=1024, depth=24, heads=16)

BUILD = {     # name: (class, sizes)
    # Public checkpoints exist for these eleven (pretrained.checkpoints.PUBLIC).
    "vit_b16": (ViT, dict(image_size=224, patch_size=16, **BASE)),
    "vit_b32": (ViT, dict(image_size=224, patch_size=32, **BASE)),
    "vit_l14": (ViT, dict(image_size=224, patch_size=14, **LARGE)),
    "audio_vit_b": (AudioViT, dict(drop_path=0.1, **BASE)),
    "bert_base": (BERT, dict(vocab_size=30522, **BASE, mlp_width=3072, max_length=512)),
    "bert_large": (BERT, dict(vocab_size=30522, **LARGE, mlp_width=4096, max_length=512)),
    "bert_minilm": (BERT, dict(vocab_size=30522, width=384, depth=6, heads=12, mlp_width=1536,
                               max_length=512)),
    "deberta_base": (DeBERTa, dict(vocab_size=50265, **BASE, mlp_width=3072, max_length=512)),
    "deberta_large": (DeBERTa, dict(vocab_size=50265, **LARGE, mlp_width=4096, max_length=512)),
    "resnet18": (ResNet, dict(blocks=(2, 2, 2, 2), bottleneck=False)),
    "resnet152": (ResNet, dict(blocks=(3, 8, 36, 3), bottleneck=True)),
    # The towers of the toys: images of 32 x 32 pixels, spectrograms of 32 mel bins x 64 frames.
    # Pre-trained weights of these two lie in this project (PUBLIC in pretrained/checkpoints.py).
    "vit_toy": (ViT, dict(image_size=32, patch_size=8, width=48, depth=3, heads=4, mlp_ratio=2)),
    "audio_vit_toy": (AudioViT, dict(mel=(32, 64), patch_size=(32, 4), stride=(32, 4),
                                     width=48, depth=3, heads=4, mlp_ratio=2)),
    # Smaller ones, for toy_mimics, start from random weights.
    "vit_mini": (ViT, dict(image_size=32, patch_size=8, width=32, depth=2, heads=4, mlp_ratio=2)),
    "audio_vit_mini": (AudioViT, dict(mel=(32, 64), patch_size=(32, 4), stride=(32, 4),
                                      width=32, depth=2, heads=4, mlp_ratio=2)),
    # Small enough to train from scratch on a laptop.
    "vit_small": (ViT, dict(image_size=96, patch_size=12, width=128, depth=4, heads=4)),
    "audio_vit_small": (AudioViT, dict(stride=16, width=128, depth=4, heads=4)),
    "resnet_small": (ResNet, dict(blocks=(2, 2, 2, 2), bottleneck=False, width=16)),
    "bert_small": (BERT, dict(vocab_size=30522, width=128, depth=2, heads=4,
                              mlp_width=512, max_length=512)),
    "deberta_small": (DeBERTa, dict(vocab_size=50265, width=128, depth=2, heads=4,
                                    mlp_width=512, max_length=512)),
}


def build(name, **overrides):
    """An encoder with random weights. Any size can be replaced: build("resnet18", in_channels=20).

    Raises ValueError for an unknown name.
    """
    if name not in BUILD:
        raise ValueError(f"no encoder is called {name!r}; there are {', '.join(BUILD)}")
    encoder_class, sizes = BUILD[name]
    return encoder_class(**(sizes | overrides))


class UnimodalModel(nn.Module):
    """What Eq. 1 trains: the encoder of one modality and a linear classifier, its head.

    `forward(x) -> logits (B, classes)`. Their softmax is P_m(y|x); with several labels a sample,
    their sigmoid is.
    """

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, classes)

    def features(self, x):
        """(B, D). V views of a sample, (B, V, C, h, w), have a feature each; this is their mean."""
        if x.dim() != 5:
            return self.encoder(x)                              # images (B, C, h, w), ids (B, T)
        views = self.encoder(x.flatten(0, 1))                   # (B * V, D)
        return views.unflatten(0, x.shape[:2]).mean(dim=1)      # (B, V, D) -> (B, D)

    def forward(self, x):
        return self.head(self.features(x))
