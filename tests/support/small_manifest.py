"""The manifest of shards that tests make themselves."""

from pipeline.data.manifest import Manifest, ShardFile, Skipped, SourceInfo, SpecialIds, Split, TokenizerInfo


def small_manifest(files: tuple[ShardFile, ...] = (), length: int = 8, vocabulary: int = 60_000) -> Manifest:
    """Of rows of `length` ids in the split "train"; everything else is of no meaning."""
    tokens = sum(file.rows for file in files) * length
    return Manifest(
        length=length,
        vocabulary=vocabulary,
        special=SpecialIds(eot=None, bos=None),
        wrap="none",
        tokenizer=TokenizerInfo(name="t", hash="t"),
        source=SourceInfo(name="s", revision=None, fingerprint="f"),
        content={},
        content_key="k",
        splits={"train": Split(files=files, documents=1, tokens=tokens, tokens_dropped=0)},
        documents=1,
        documents_empty=0,
        tokens=tokens,
        skipped=Skipped(count=0, names=()),
    )
