"""`tpu-tune push`: put what a run has made on the Hugging Face hub, with a model card."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from tpu_tune.cli.common import Commands, add_step
from tpu_tune.cli.export import add_forms, check_forms
from tpu_tune.errors import counted

_CARD_LINES = 24


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "push",
        run,
        "upload a run's adapter or model to the Hugging Face hub, with a model card",
        "tpu-tune push output/quickstart --repo me/my-adapter --dry-run",
    )
    parser.add_argument("run_directory", metavar="RUN", help="run directory, local or gs://")
    add_step(parser)
    parser.add_argument(
        "--repo",
        required=True,
        metavar="NAMESPACE/NAME",
        help="repository, made if it does not exist, else it gets a new commit; a NAME alone goes under the token's "
        "owner",
    )
    add_forms(parser)
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--revision", default="", metavar="BRANCH", help="branch to commit to (default main)")
    parser.add_argument("--message", default="", metavar="TEXT", help="of the commit")
    parser.add_argument(
        "--license",
        default="",
        metavar="ID",
        help="for the card, e.g. apache-2.0 (default: the base's, if it is known)",
    )
    parser.add_argument(
        "--base-model", default="", metavar="ID", help="hub id of the base, where the run was trained on a local copy"
    )
    parser.add_argument("--card-only", action="store_true", help="renew the card and curves.png, leave the weights")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the files and show the card; nothing is sent, no token is needed, what is merged for it is removed",
    )


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    check_forms(options)
    if options.dry_run:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: not even the base is fetched
    from tpu_tune.inference import push

    request = push.PushRequest(
        options.repo,
        "gguf" if options.gguf else "merged" if options.merge else "adapter",
        options.merge_base or "original",
        options.dtype or "",
        options.gguf_type or "f16",
        options.revision,
        options.license,
        options.base_model,
        options.card_only,
        options.step,
    )
    _, request = push.check(options.run_directory, request)
    if options.dry_run:
        with push.prepared(options.run_directory, request) as (files, figures):
            _tell(options, request, files, figures, "")
        return 0
    token = push.find_token()
    request = push.open_repo(
        token, request, options.private
    )  # first, so that a refusal comes before an hour of merging
    message = options.message or f"Upload {_WHAT['card' if request.card_only else request.form]} with tpu_tune"
    with push.prepared(options.run_directory, request) as (files, figures):
        address = push.upload(token, request, files, message)
        _tell(options, request, files, figures, address)
    return 0


_WHAT = {"adapter": "an adapter", "merged": "a model", "gguf": "a GGUF file", "card": "the card"}


def _tell(options: argparse.Namespace, request: Any, files: list[Any], figures: dict[str, Any], address: str) -> None:
    card = files[0].content.decode()
    if options.json:
        listed = [{"name": file.name, "bytes": file.size} for file in files]
        facts = {"repo": request.repo, "dry_run": options.dry_run, "files": listed, **figures}
        print(json.dumps({**facts, "card": card} if options.dry_run else {**facts, "commit": address}))
        return
    print(f"{request.repo}: {'would get' if options.dry_run else 'got'} {counted(len(files), 'file')}")
    for file in files:
        print(f"  {_bytes(file.size):>10}  {file.name}")
    if figures:
        print(
            f"  the merged model's logits differ from the trained one's by at most "
            f"{figures['relative_logit_difference']:.2%} of the largest"
        )
    if options.dry_run:
        lines = card.splitlines()
        print("\n".join(["README.md:", *(f"  {line}".rstrip() for line in lines[:_CARD_LINES])]))
        if len(lines) > _CARD_LINES:
            print(f"  ... {len(lines) - _CARD_LINES} more lines")
        print("nothing was sent; leave --dry-run out to push")
    if "\nlicense: " not in card:
        print("the card names no license, as the base's is not known here; --license ID adds one")
    if address:
        print(address)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
