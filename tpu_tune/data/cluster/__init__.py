"""`cluster`: rows grouped by what they say, a diverse part of them kept, outliers listed, all drawn as a map.

The file is read once to count and sample it, once to make a vector of each row (`features`), and once to write the
rows that are kept; in between, k-means (`kmeans`) reads the vectors block by block. They lie in a memory-mapped
file, so that a million rows need no more memory than their labels.
"""

from tpu_tune.data.cluster.cluster_options import ClusterOptions
from tpu_tune.data.cluster.clustering import cluster
from tpu_tune.data.cluster.kmeans import Clusters

__all__ = ["ClusterOptions", "Clusters", "cluster"]
