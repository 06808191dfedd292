"""From a folder of anything to rows: the first step of preparing data.

`ingest` writes one JSON Lines file from files, folders, patterns, archives and names of datasets. `find_sources` lists
what to read; `read_source` reads one source into rows and is a plain function of a path and `IngestOptions`, so that a
process pool or another engine can read a file each. Readers are one module a kind: `html`, `documents` (text,
Markdown), `epub`, `tables` (CSV, Parquet, Arrow), `jsons`, `chats`, `sql`, `sqlite`, `dictd`, `catalog` (named
datasets). Nothing that is read is executed, and only temporary copies are written beside the output.
"""

from tpu_tune.data.ingest.blobs import Tally
from tpu_tune.data.ingest.finding import Found, find_sources
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.data.ingest.ingesting import IngestReport, ingest
from tpu_tune.data.ingest.reading import KINDS, read_source

__all__ = ["KINDS", "Found", "IngestOptions", "IngestReport", "Tally", "find_sources", "ingest", "read_source"]
