"""The parts of a model once more, in plain numpy, with what people get wrong as arguments."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from einops import rearrange

from flax_vit.checks import pair


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Round to the 10 bits behind the point that the products of a tensor core keep, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


ADDED = 'pos_embedding', 'cls_token', 'register_tokens'  # to the tokens, before the first block
MAPS = 2**26  # numbers of attention maps that are held to try other heads
ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'float64': lambda x: x,
    'float32': lambda x: x.astype(np.float32),
    'TF32': to_tf32,
    'bfloat16': lambda x: x.astype(ml_dtypes.bfloat16),
    'float16': lambda x: x.astype(np.float16),
}


def gelu(x: np.ndarray) -> np.ndarray:
    """By the error function."""
    from scipy.special import erf  # which takes a tenth of a second, and only a port that is wrong comes here

    return x * (1 + erf(x / math.sqrt(2))) / 2


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'erf': gelu,
    'tanh': lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    'sigmoid': lambda x: x / (1 + np.exp(-1.702 * x)),
    'relu': lambda x: np.maximum(x, 0),
}


@dataclass(frozen=True)
class Way:
    """A way to compute the parts of a model for one image. The defaults are PyTorch's, in float64."""

    # PyTorch's names of modules within their part
    TO_OUT: ClassVar[str]
    SECOND_LINEAR: ClassVar[str]
    POOLS: ClassVar[Mapping[str, str]] = {
        'cls': 'the class token',
        'mean': 'the mean of all tokens',
        'mean of the others': 'the mean of all tokens but the first',
        'last': 'the last token',
    }

    model: Any
    tensors: Mapping[str, np.ndarray]  # PyTorch's names and shapes; also a SimpleViT's 'pos_embedding'
    heads: int
    cut: str = '(h p1) (w p2) c -> (h w) (p1 p2 c)'
    class_token: str = 'first'
    epsilon: float = 1e-5  # of the norms
    epsilons: Mapping[str, float] = field(default_factory=dict)  # of those that have another
    variance: str = 'two-pass'
    statistics: str = 'float64'  # of the norms
    left_out: frozenset[str] = frozenset()  # norms, 'residual', 're-attention'
    scale: float | None = None  # of queries x keys; None: dim_head**-0.5, whatever it is
    softmax: str = 'float64'
    softmax_axis: int = -1  # of heads, queries, keys
    join: str = 'n (h d)'
    activation: str = 'erf'
    final_norm: str | None = None  # its name, None: no norm here
    norm_when: str = 'before'  # pooling
    pool: str = 'mean'
    products: str = 'float64'  # what the inputs of matrix products are rounded to
    dtype: str = 'float64'  # what all results are rounded to, also within a part; sums are in float32 at least
    batch: Sequence[np.ndarray] = ()  # what goes into the part, of every image: for what looks at them all

    @classmethod
    def right(cls, model: Any, tensors: Mapping[str, np.ndarray]) -> 'Way':
        """PyTorch's, with tensors in float64."""
        raise NotImplementedError

    @classmethod
    def in_matrices(cls, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Tensors of today's names as a way has them: what is multiplied by is a matrix, of vit-pytorch's order."""
        return dict(tensors)

    @classmethod
    def owned(cls, model: Any, part: str) -> tuple[str, ...]:
        """The beginnings of the names of the parameters that a part depends on."""
        if part.startswith('to_patch_embedding'):
            return ('to_patch_embedding.',)
        positions = ADDED if part == 'transformer.layers.0.0' else ()
        ends = {'to_latent': ('transformer.norm.',), '': (f'{model.HEAD}.', 'pre_logits.')}
        return ends.get(part, (f'{part}.', *positions))

    @classmethod
    def for_part(cls, model: Any, tensors: Mapping[str, np.ndarray], part: str) -> 'Way':
        """PyTorch's way, with the tensors that the part and the tokens before it need."""
        needed = (*cls.owned(model, part), *ADDED)
        if part == 'to_latent':
            needed += (f'{model.HEAD}.0.',)  # the norm that may be taken before pooling by mistake
        exact = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items() if name.startswith(needed)}
        return cls.right(model, cls.in_matrices(exact))

    def own_mistakes(self, part: str, tokens: int) -> Iterator['Mistake']:
        """What may be done by mistake in this kind of model; if nothing tells how many heads it has, also that."""
        inner_dim = len(self.tensors.get(f'{part}.to_qkv.weight', ())) // 3
        for heads in range(1, inner_dim + 1):
            if inner_dim % heads == 0 and heads != self.heads and heads * tokens**2 <= MAPS:
                yield Mistake(f'if heads={heads} instead of {self.heads}', {'heads': heads})

    @property
    def has_class_token(self) -> bool:
        """Whether one is there: where PyTorch's is empty, none is."""
        return 'cls_token' in self.tensors and self.tensors['cls_token'].size > 0

    def position_mistakes(self) -> dict[str, np.ndarray]:
        """Positions (…, tokens, dim) that are wrong, by the words for it; the first is the class token's."""
        right = self.tensors['pos_embedding']
        wrong = {'without positions': np.zeros_like(right)}
        if self.has_class_token:
            first, others = right[..., :1, :], right[..., 1:, :]
            wrong |= {
                'if the class token takes the last position': np.roll(right, 1, axis=-2),
                "if the patches start at the class token's position": np.roll(right, -1, axis=-2),
                'if the class token gets no position': np.concatenate([0 * first, others], axis=-2),
            }
        return wrong

    def compute(self, part: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """The output of the part that PyTorch calls so; `inputs` as `part_inputs` gives them."""
        x = self.joined(part, inputs)
        if part.startswith('to_patch_embedding'):
            return self.patch_embedding(x)
        if part == 'to_latent':
            return self.pooled(x)
        if part == '':
            return self.logits(x)
        return self.attention(x, part) if part.endswith('.0') else self.feed_forward(x, part)

    def joined(self, part: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """What goes into a part, of the addends."""
        if 'residual' in self.left_out:
            inputs = inputs[-1:]
        x = sum(inputs[1:], start=inputs[0])
        return self.embedded(x) if part == 'transformer.layers.0.0' else x

    def patch_embedding(self, image: np.ndarray) -> np.ndarray:
        """(height, width, channels) -> (tokens, dim)."""
        rows, columns = pair(self.model.patch_size)
        x = rearrange(image, self.cut, p1=rows, p2=columns)
        if not self.model.patch_norm:
            return self.linear(x, 'to_patch_embedding.1')
        x = self.linear(self.norm(x, 'to_patch_embedding.1'), 'to_patch_embedding.2')
        return self.norm(x, 'to_patch_embedding.3')

    def embedded(self, x: np.ndarray) -> np.ndarray:
        """The tokens with the class token and their positions."""
        if 'cls_token' in self.tensors:
            tokens = [self.tensors['cls_token'].reshape(-1, x.shape[1]), x]
            x = np.concatenate(tokens if self.class_token == 'first' else tokens[::-1])
        return x + self.tensors['pos_embedding'].reshape(-1, x.shape[1])[: len(x)]

    def attention(self, x: np.ndarray, name: str) -> np.ndarray:
        q, k, v = self.queries_keys_values(x, name)
        out = self.rounded(self.product(self.reattended(self.attention_map(q, k), name), v))
        joined = out.reshape(len(x), -1) if self.join == 'reshape' else rearrange(out, f'h n d -> {self.join}')
        projection = f'{name}.{self.TO_OUT}'
        return self.linear(joined, projection) if f'{projection}.weight' in self.tensors else joined

    def queries_keys_values(self, x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each (heads, tokens, dim_head)."""
        qkv = self.linear(self.norm(x, f'{name}.norm'), f'{name}.to_qkv')
        q, k, v = rearrange(qkv, 'n (qkv h d) -> qkv h n d', qkv=3, h=self.heads)
        return self.normalised(q, f'{name}.q_norm'), self.normalised(k, f'{name}.k_norm'), v

    def attention_map(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """The softmax (heads, queries, keys)."""
        dots = self.rounded(self.product(q, k.swapaxes(1, 2)) * (self.scale or q.shape[-1] ** -0.5))
        logits = ROUNDINGS[self.softmax](self.wide(dots))
        attn = np.exp(logits - logits.max(axis=self.softmax_axis, keepdims=True))
        return self.rounded(self.wide(attn / attn.sum(axis=self.softmax_axis, keepdims=True)))

    def normalised(self, x: np.ndarray, name: str) -> np.ndarray:
        """What becomes of queries or keys (heads, tokens, dim_head) before they are multiplied."""
        return x

    def reattended(self, attn: np.ndarray, name: str) -> np.ndarray:
        """What becomes of the softmax (heads, queries, keys) before it is multiplied by the values."""
        return attn

    def feed_forward(self, x: np.ndarray, name: str) -> np.ndarray:
        x = self.wide(self.linear(self.norm(x, f'{name}.net.0'), f'{name}.net.1'))
        return self.linear(self.rounded(ACTIVATIONS[self.activation](x)), f'{name}.{self.SECOND_LINEAR}')

    def pooled(self, x: np.ndarray) -> np.ndarray:
        if self.final_norm and self.norm_when == 'before':
            x = self.norm(x, self.final_norm)
        x = self.rounded(self.wide(self.pools(x)[self.pool]).mean(axis=0))
        return self.norm(x, self.final_norm) if self.final_norm and self.norm_when == 'after' else x

    def pools(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """The tokens whose mean each of POOLS is."""
        return {'cls': x[:1], 'mean': x, 'last': x[-1:], 'mean of the others': x[1:]}

    def logits(self, x: np.ndarray) -> np.ndarray:
        if not self.model.num_classes:
            return x
        head = self.model.HEAD
        if f'{head}.weight' in self.tensors:
            return self.linear(x, head)
        return self.linear(self.norm(x, f'{head}.0'), f'{head}.1')

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.rounded(self.product(x, self.tensors[f'{name}.weight'].T) + self.tensors.get(f'{name}.bias', 0.0))

    def product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The sums, not rounded yet."""
        return self.wide(ROUNDINGS[self.products](a)) @ self.wide(ROUNDINGS[self.products](b))

    def wide(self, x: np.ndarray) -> np.ndarray:
        """In the dtype that sums are in."""
        return np.asarray(x, np.float64 if self.dtype == 'float64' else np.float32)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """In the dtype that is computed in."""
        return ROUNDINGS[self.dtype](x)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        if name in self.left_out:
            return x
        rounded = ROUNDINGS[self.statistics](self.wide(x))
        mean = rounded.mean(axis=-1, keepdims=True)
        if self.variance == 'fast':
            variance = np.maximum((rounded * rounded).mean(axis=-1, keepdims=True) - mean * mean, 0)
        else:
            variance = rounded.var(axis=-1, keepdims=True, ddof=1 if self.variance == 'unbiased' else 0)
        normalised = (rounded - mean) / np.sqrt(variance + self.epsilons.get(name, self.epsilon))
        return self.rounded(normalised * self.tensors[f'{name}.weight'] + self.tensors[f'{name}.bias'])


@dataclass(frozen=True, eq=False)
class Mistake:
    """What somebody did otherwise: arguments of a Way and tensors read wrongly."""

    words: str  # after 'matches'
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    default: bool = False  # a framework's epsilon, that whoever forgot it once forgot wherever there is one
    repeats: bool = False  # a rounding that numpy makes as XLA does

    def applied(self, way: Way) -> Way:
        return replace(way, **self.fields, tensors={**way.tensors, **self.tensors})

    def and_also(self, other: 'Mistake') -> 'Mistake':
        words = f'{self.words} and {other.words}'
        return Mistake(words, {**self.fields, **other.fields}, {**self.tensors, **other.tensors})


def part_inputs(way: Way, image: np.ndarray, outputs: Mapping[str, np.ndarray], part: str) -> list[np.ndarray]:
    """What a part takes, as the addends of the residual stream, the output of the part before it last.

    `image`: (height, width, channels); `outputs`: PyTorch's of the earlier parts, in computing order. Of the first
    block it is the patch embedding alone: class token and positions count as the first attention's.
    """
    before = list(outputs)[: list(outputs).index(part)]
    if not before:
        return [way.rounded(way.wide(image))]
    if part == '' or len(before) == 1:
        return [outputs[before[-1]]]
    return [way.embedded(outputs[before[0]]), *(outputs[name] for name in before[1:])]


def short(name: str, part: str) -> str:
    """A parameter's name as one says it within its block."""
    return name.removeprefix(f'{part}.') if part.startswith('transformer') else name
