"""The plots of a parity report, as SVG in data URLs. Matplotlib is imported when one is drawn."""

import base64
import io
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from einops import rearrange

from convert.proof.parity import Report

# On light and on dark ground. Blue and orange are told apart by every kind of colour vision, and in grey.
COLOURS = {
    'ground': ('#ffffff', '#161719'),
    'ink': ('#1c1d1f', '#ececec'),
    'muted': ('#5f6368', '#a3a7ad'),
    'line': ('#d9dbde', '#3b3e43'),
    'band': ('#f3f4f6', '#202226'),
    'flax': ('#0067a8', '#5ab4ee'),
    'torch': ('#c2540a', '#f0a04b'),
}
INK, MUTED, LINE, BAND, FLAX, TORCH = (COLOURS[name][0] for name in ('ink', 'muted', 'line', 'band', 'flax', 'torch'))
WIDTH = 9.6  # inches, of the page's column
PIXELS = 64  # at least, of a side of an attention map
TOKENS, HEADS = 256, 16  # at most, in a picture of attention maps


def draw(report: Report, figures: Mapping[str, Any]) -> dict[str, str | None]:
    """All plots of a report, each the data URL of an image."""
    import matplotlib

    style: Any = {
        'axes.edgecolor': MUTED,
        'axes.labelcolor': MUTED,
        'font.size': 10,
        'svg.hashsalt': 'flax_vit',  # the same report, the same bytes
        'text.color': INK,
        'xtick.color': MUTED,
        'ytick.color': MUTED,
    }
    with matplotlib.rc_context(matplotlib.rcParamsDefault | style):
        return {
            'errors_plot': errors(figures),
            'logits_plot': logits(report),
            'attention_plot': attention(report) if report.attention else None,
        }


def errors(figures: Mapping[str, Any]) -> str:
    """Error against depth on a log scale: Flax and PyTorch in the compared dtype, and their difference in float64."""
    parts, dtype, truth = figures['parts'], figures['run']['dtype'], figures['truth']
    count = len(parts)
    figure, axes = _figure(4.5, bottom=0.75, top=0.1, right=0.75)
    curves = {f'Flax − {truth}, float64': ('float64', INK, '-', 'o'), 'limit, float64': ('limit', INK, ':', '')}
    if dtype != 'float64':
        ratio = f'{figures["limits"]["ratio"]:.0f}'
        curves |= {
            f'limit: {ratio} × {truth}’s error': ('flax_limit', TORCH, ':', ''),
            f'{truth}’s error, {dtype}': ('torch', TORCH, '-', 's'),
            f'Flax’s error, {dtype}': ('flax', FLAX, '-', 'o'),
        }
    values = {label: np.array([part[key] for part in parts]) for label, (key, *_) in curves.items()}
    drawable = np.concatenate([value[np.isfinite(value) & (value > 0)] for value in values.values()])
    bottom, top = drawable.min() / 4, drawable.max() * 4

    blocks = [position for position, part in enumerate(parts) if part['label'].endswith('attention')]
    for position in blocks[::2]:
        axes.axvspan(position - 0.5, position + 1.5, color=BAND, linewidth=0, zorder=0)
    for label, (_, colour, line, marker) in curves.items():
        # What a log scale can't show stands at its edges: equality below, what is no finite number above.
        shown = np.clip(np.nan_to_num(values[label], nan=top, posinf=top), bottom, top)
        # A square round a dot: two curves in the same place are still seen as two.
        fill, size = ('none', 7.5) if marker == 's' else (colour, 4)
        size = size if count < 30 else size / 2
        axes.plot(shown, color=colour, linestyle=line, linewidth=1.6, marker=marker, mfc=fill, markersize=size)
        values[label] = shown
    wrong = [position for position, part in enumerate(parts) if not part['right']]
    if wrong:
        highest = [max(shown[position] for shown in values.values()) for position in wrong]
        axes.plot(wrong, highest, 'x', color=INK, markersize=9, markeredgewidth=2)
        axes.annotate(
            'first wrong', (wrong[0], highest[0]), (0, 9), textcoords='offset points', ha='center', weight='bold'
        )
        top *= 6

    axes.set_yscale('log')
    axes.set(xlim=(-0.5, count - 0.5), ylim=(bottom, top), ylabel='relative error')
    ends = np.log10([shown[-1] for shown in values.values()])
    heights = _apart(ends, gap=0.055 * np.log10(top / bottom))
    for (label, (_, colour, *_)), height in zip(curves.items(), heights, strict=True):
        axes.annotate(label, (count - 0.5, 10**height), (6, 0), textcoords='offset points', color=colour, va='center')
    few = len(blocks) <= 6
    names = {'patch embedding': count < 20, 'pooled features': count < 14, parts[-1]['label']: True}
    ticks = {
        0.5 + blocks[block]: f'block {block}' if few else str(block)
        for block in range(0, len(blocks), -(-len(blocks) // 12))
    }
    ticks |= {
        position: part['label'].replace(' ', '\n') for position, part in enumerate(parts) if names.get(part['label'])
    }
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel(
        'in the order of computation; of a block: attention, feed-forward' + ', blocks by number' * (not few)
    )
    axes.grid(axis='y', color=LINE, linewidth=0.6)
    return _data_url(figure)


def logits(report: Report) -> str:
    """A histogram of how far the logits are from PyTorch's in float64: of Flax, filled, and of PyTorch, as a line."""
    truth, theirs, _, ours = report.logits
    sides = {'Flax': (ours - truth, FLAX)}
    if report.dtype != 'float64':
        sides[report.truth] = (theirs - truth, TORCH)
    finite = {label: difference[np.isfinite(difference)] for label, (difference, _) in sides.items()}
    largest = max((np.abs(difference).max(initial=0) for difference in finite.values()), default=0) or 1e-17
    exponent = int(np.floor(np.log10(largest)))
    exponent = 0 if -2 <= exponent <= 3 else exponent
    unit = 10.0**exponent
    bins = np.linspace(-largest, largest, (int(np.clip(ours.size // 6, 9, 41)) | 1) + 1) / unit  # one is round zero

    figure, axes = _figure(3.2, right=0.99)
    for number, (label, (_, colour)) in enumerate(sides.items()):
        counts, edges = np.histogram(finite[label] / unit, bins)
        axes.stairs(
            counts, edges, color=colour, fill=label == 'Flax', alpha=0.45 if label == 'Flax' else 1, linewidth=2
        )
        kind = 'filled' if label == 'Flax' else 'line'
        text = f'{label} ({kind}): at most {np.abs(finite[label]).max(initial=0):.1e}'
        if finite[label].size < ours.size:
            text += f'; {ours.size - finite[label].size} not finite'
        axes.text(
            number, 1.03, text, transform=axes.transAxes, color=colour, weight='bold', ha='right' if number else 'left'
        )
    power = ', in 10' * (exponent != 0) + str(exponent or '').translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))
    axes.set(xlabel=f'logit − the same logit of {report.truth} in float64{power}', ylabel='number of logits')
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.axvline(0, color=MUTED, linewidth=0.8, zorder=0)
    return _data_url(figure)


def attention(report: Report) -> str:
    """The attention maps of PyTorch and of Flax, all heads side by side, and their difference."""
    from matplotlib.figure import Figure

    # Of huge models, a part.
    maps = {label: [side[:HEADS, :TOKENS, :TOKENS] for side in sides] for label, sides in report.attention.items()}
    tiles = {label: [_tile(side) for side in sides] for label, sides in maps.items()}
    left, gap = 1.55, 0.2  # inches
    column = (WIDTH - left - 2 * gap) / 3
    heights = [column * max(side.shape[0] / side.shape[1] for side in sides) for sides in tiles.values()]
    space = 0.45  # under each map, for its scale
    height = sum(heights) + space * len(heights) + 0.35
    figure = Figure((WIDTH, height))
    figure.subplots_adjust(left / WIDTH, space / height, 1, 1 - 0.35 / height, gap / column, space / np.mean(heights))
    grid = figure.subplots(len(tiles), 3, squeeze=False, height_ratios=heights)
    for (label, (theirs, ours)), line in zip(tiles.items(), grid, strict=True):
        both = maps[label]
        finite = np.concatenate([side[np.isfinite(side)] for side in both])
        smallest, largest = finite.min(initial=1), finite.max(initial=0)
        if smallest < 0:  # after re-attention
            largest = np.abs(finite).max()
            smallest = -largest
        for axes, tile in zip(line[:2], (theirs, ours), strict=True):
            _picture(axes, tile, smallest, largest)
            axes.set_xlabel(f'{smallest:.2g} … {largest:.2g}'.replace('-', '−'), color=MUTED)
        if both[0].shape == both[1].shape:
            difference = both[1] - both[0]
            most = np.abs(difference[np.isfinite(difference)]).max(initial=0)
            _picture(line[2], _tile(difference), -most, most)
            line[2].set_xlabel(f'at most {most:.1e}', color=MUTED)
        else:
            heads, tokens = ([side.shape[axis] for side in both] for axis in (0, 1))
            text = f'{heads[1]} heads of {tokens[1]} tokens\nagainst {heads[0]} of {tokens[0]}'
            line[2].text(0.5, 0.5, text, transform=line[2].transAxes, ha='center', va='center')
            line[2].set_axis_off()
        line[0].set_ylabel(label.replace(', ', '\n'), rotation=0, ha='left', va='center', labelpad=0)
        line[0].yaxis.set_label_coords(-left / column, 0.5)
    titles = {report.truth: TORCH, 'Flax': FLAX, f'Flax − {report.truth}': INK}
    for number, (title, colour) in enumerate(titles.items()):
        centre = (left + column / 2 + number * (column + gap)) / WIDTH
        figure.text(centre, 1 - 0.2 / height, title, color=colour, weight='bold', ha='center')
    return _data_url(figure)


def _tile(maps: np.ndarray) -> np.ndarray:
    """All heads (heads, queries, keys) in one picture, each large enough to be seen, with gaps of NaN between."""
    heads, queries, _ = maps.shape
    columns = next((number for number in range(1, heads) if heads % number == 0 and number**2 >= 1.5 * heads), heads)
    zoom, gap = -(-PIXELS // queries), 6
    large = maps.repeat(zoom, axis=1).repeat(zoom, axis=2)
    framed = np.pad(large, ((0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    return rearrange(framed, '(rows columns) h w -> (rows h) (columns w)', columns=columns)[:-gap, :-gap]


def _picture(axes: Any, tile: np.ndarray, smallest: float, largest: float) -> None:
    """The tile in blues, or, where the scale goes below zero, from blue by white to red."""
    colours = 'RdBu_r' if smallest < 0 else 'Blues'
    axes.imshow(tile, cmap=colours, vmin=smallest, vmax=largest, interpolation='none')
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _apart(positions: np.ndarray, gap: float) -> np.ndarray:
    """The positions, moved a little where two are nearer than `gap`: labels there would overlap."""
    order, moved = np.argsort(positions, kind='stable'), positions.copy()
    for _ in range(100):  # each pair pushes apart, and so pushes its neighbours
        for low, high in pairwise(order):
            overlap = max(gap - (moved[high] - moved[low]), 0.0)
            moved[low] -= overlap / 2
            moved[high] += overlap / 2
    return moved


def _figure(height: float, *, bottom: float = 0.6, top: float = 0.3, right: float) -> Any:
    """A figure and its axes. `bottom` and `top` are margins in inches, `right` is a share of the width."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height))
    figure.subplots_adjust(0.75 / WIDTH, bottom / height, right, 1 - top / height)
    axes = figure.subplots()
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes


def _data_url(figure: Any) -> str:
    """The figure as SVG, its colours by the reader's choice of light or dark."""
    file = io.StringIO()
    figure.savefig(file, format='svg', transparent=True, metadata={'Creator': None, 'Date': None})
    svg = file.getvalue()
    light = ''.join(f'--{name}:{colour};' for name, (colour, _) in COLOURS.items())
    dark = ''.join(f'--{name}:{colour};' for name, (_, colour) in COLOURS.items())
    for name, (colour, _) in COLOURS.items():
        svg = svg.replace(colour, f'var(--{name})')
    style = f'<style>:root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>'
    svg = svg.replace('<defs>', f'{style}<defs>', 1)
    return 'data:image/svg+xml;base64,' + base64.b64encode(svg.encode()).decode()
