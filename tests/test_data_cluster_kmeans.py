"""k-means against a plain Lloyd in NumPy and against scikit-learn; the same on one device and on eight."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_tune.data.cluster import kmeans as module
from tpu_tune.data.cluster import subset
from tpu_tune.data.cluster.kmeans import Clusters, KMeansOptions, kmeans
from tpu_tune.data.cluster.seeding import first_centers
from tpu_tune.errors import UserError

K, COLUMNS = 8, 16


@functools.cache
def blobs(rows=1003, count=12, seed=0, spread=2.0):
    random = np.random.RandomState(seed)
    centers = random.randn(count, COLUMNS) * spread
    return (centers[random.randint(0, count, rows)] + random.randn(rows, COLUMNS) + 3).astype(np.float32)


def lloyd(data, centers, steps):
    """The textbook's, in float64."""
    data, centers = data.astype(np.float64), centers.astype(np.float64)
    for _ in range(steps):
        labels = np.square(data[:, None] - centers).sum(axis=2).argmin(axis=1)
        centers = np.stack([data[labels == cluster].mean(axis=0) for cluster in range(len(centers))])
    squared = np.square(data[:, None] - centers).sum(axis=2)
    return centers, squared.argmin(axis=1), squared.min(axis=1)


@pytest.mark.parametrize("offset", [0, 300])  # far from the origin float32 products lose what tells centres apart
def test_lloyd_from_the_same_start_as_numpys(offset):
    data = blobs() + np.float32(offset)
    start = data[:: len(data) // K][:K]
    found = kmeans(data, K, 0, KMeansOptions(mini_batch=False, max_iterations=4, tolerance=0), start=start)
    centers, labels, squared = lloyd(data, start, 4)
    assert found.iterations == 4 and not found.converged
    np.testing.assert_allclose(found.centers, centers, atol=1e-5 * np.abs(centers).max())
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.distances, np.sqrt(squared), rtol=1e-4 if offset else 1e-5)
    assert found.inertia == pytest.approx(squared.sum(), rel=1e-4 if offset else 1e-5)


def test_stops_when_nothing_moves_and_is_then_at_rest():
    data = blobs()
    found = kmeans(data, K, 1, KMeansOptions(mini_batch=False, tolerance=0))
    assert found.converged and found.iterations < 100
    centers, labels, _ = lloyd(data, found.centers, 1)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.centers, centers, atol=1e-5)


def test_as_good_as_scikit_learns():
    sklearn = pytest.importorskip("sklearn.cluster")
    data = blobs(12_000, 40)
    theirs = min(sklearn.KMeans(K, n_init=1, random_state=seed).fit(data).inertia_ for seed in range(3))
    exact = kmeans(data, K, 0, KMeansOptions(mini_batch=False))
    assert exact.inertia <= 1.02 * theirs
    theirs = sklearn.MiniBatchKMeans(K, random_state=0, n_init=3).fit(data).inertia_
    found = kmeans(data, K, 0, KMeansOptions(mini_batch=True, batch_size=1024))
    assert found.inertia <= 1.02 * theirs
    _, labels, squared = lloyd(data, found.centers, 0)
    assert (found.labels == labels).mean() > 0.9999
    assert found.inertia == pytest.approx(squared.sum(), rel=1e-5)


def test_first_centers_are_rows_and_better_spread_than_scikit_learns():
    sklearn = pytest.importorskip("sklearn.cluster")
    data = blobs()

    def potential(centers):
        return np.square(data[:, None] - centers).sum(axis=2).min(axis=1).sum()

    ours = [first_centers(data, K, seed) for seed in range(4)]
    assert all((data == center).all(axis=1).any() for center in ours[0])
    assert len(np.unique(ours[0], axis=0)) == K and not np.array_equal(ours[0], ours[1])
    theirs = [sklearn.kmeans_plusplus(data, K, random_state=seed)[0] for seed in range(4)]
    assert np.mean([*map(potential, ours)]) < np.mean([*map(potential, theirs)])


@pytest.mark.parametrize("mini_batch", [False, True])
def test_eight_devices_find_what_one_finds(mini_batch, tmp_path):
    assert jax.device_count() == 8
    data = blobs()
    options = KMeansOptions(mini_batch=mini_batch, batch_size=256)
    alone = kmeans(data, K, 3, options, devices=jax.devices()[:1])
    together = kmeans(data, K, 3, options)
    np.save(tmp_path / "data.npy", data)
    mapped = kmeans(np.load(tmp_path / "data.npy", mmap_mode="r"), K, 3, options)
    for other in (together, mapped):
        assert other.centers.tobytes() == alone.centers.tobytes()
        assert other.labels.tobytes() == alone.labels.tobytes()
        assert other.distances.tobytes() == alone.distances.tobytes()
        assert (other.inertia, other.iterations) == (alone.inertia, alone.iterations)


def test_rows_are_read_block_by_block(monkeypatch):
    class Watched:
        """Rows that remember how many of them were asked for at one time."""

        def __init__(self, rows):
            self.rows, self.most = rows, 0

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, which):
            found = self.rows[which]
            self.most = max(self.most, len(found))
            return found

        shape = property(lambda self: self.rows.shape)

    data = blobs(4000)
    whole = kmeans(data, K, 0, KMeansOptions(mini_batch=False, max_iterations=3), start=data[:K])
    monkeypatch.setattr(module, "BLOCK_BYTES", 1024 * 4 * COLUMNS)
    monkeypatch.setattr(module, "_SAMPLE", 500)
    monkeypatch.setattr(module, "CHUNK", 64)
    watched = Watched(data)
    parts = kmeans(watched, K, 0, KMeansOptions(mini_batch=False, max_iterations=3), start=data[:K])
    assert 500 <= watched.most <= 1024
    np.testing.assert_array_equal(parts.labels, whole.labels)
    np.testing.assert_allclose(parts.centers, whole.centers, atol=1e-5)


def test_a_centre_that_lost_its_rows_begins_anew():
    data = blobs()
    start = np.concatenate([data[: K - 2], np.full((2, COLUMNS), 1e4, np.float32)])
    found = kmeans(data, K, 0, KMeansOptions(mini_batch=False), start=start)
    assert np.bincount(found.labels, minlength=K).min() > 0


def test_copies_of_few_rows():
    data = np.repeat(blobs()[:3], 100, axis=0)
    found = kmeans(data, K)
    assert found.inertia < 1e-6 and len(np.unique(found.labels)) == 3 and found.converged


@pytest.mark.parametrize(
    "data, k, words",
    [
        (blobs()[:5], 6, "k is 6; it must be at least 1 and at most the number of rows, 5"),
        (blobs()[:5], 0, "k is 0"),
        (np.array([[1.0, np.nan], [0, 1]], np.float32), 1, "not all finite"),
    ],
)
def test_bad_input(data, k, words):
    with pytest.raises(UserError, match=words):
        kmeans(data, k)


# --- subsets --------------------------------------------------------------------------------------------------------
SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=8)


@given(SIZES, st.integers(0, 120))
def test_shares_are_as_even_as_the_sizes_allow(sizes, total):
    given_out = subset.shares(sizes, total)
    assert sum(given_out) == min(total, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(given_out, sizes, strict=True))
    most = max(given_out)
    assert all(share >= most - 1 for share, size in zip(given_out, sizes, strict=True) if share < size)


@given(SIZES, st.sampled_from(subset.SELECTIONS), st.integers(0, 12), st.booleans(), st.integers(0, 2**32 - 1))
def test_what_is_kept(sizes, way, count, in_all, seed):
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    if not len(labels):
        return
    data = random.standard_normal((len(labels), 3)).astype(np.float32)
    distances = np.linalg.norm(data, axis=1)
    left_out = random.random(len(labels)) < 0.2
    limits = subset.Limits(total=count) if in_all else subset.Limits(per_cluster=count)
    clusters = Clusters(np.zeros((len(sizes), 3)), labels, distances, 0.0, 1, True)
    kept = subset.kept(way, data, clusters, left_out, limits, seed)
    again = subset.kept(way, data, clusters, left_out, limits, seed)
    np.testing.assert_array_equal(kept, again)
    assert not (kept & left_out).any()
    left = np.bincount(labels[~left_out], minlength=len(sizes))
    here = np.bincount(labels[kept], minlength=len(sizes))
    if in_all:
        assert here.tolist() == subset.shares(left.tolist(), count)
    else:
        np.testing.assert_array_equal(here, np.minimum(left, count))
    if way != "random":  # the row nearest its centre is always among them
        for cluster in np.flatnonzero(here):
            rows = np.flatnonzero((labels == cluster) & ~left_out)
            assert kept[rows[distances[rows].argmin()]]


def test_farthest_is_greedy_k_center():
    random = np.random.RandomState(0)
    data = random.randn(40, 3).astype(np.float32)
    rows, distances = np.arange(5, 40), np.linalg.norm(data, axis=1)
    chosen = [rows[distances[rows].argmin()]]
    while len(chosen) < 9:
        away = np.linalg.norm(data[rows][:, None] - data[chosen], axis=2).min(axis=1)
        chosen.append(rows[away.argmax()])
    found = subset.select("farthest", data, distances, rows, 9, random)
    assert found.tolist() == sorted(chosen)


def test_balanced_goes_from_the_centre_to_the_rim():
    data = np.arange(101, dtype=np.float32)[:, None]
    assert subset.select("balanced", data, data[:, 0], np.arange(101), 5, None).tolist() == [0, 25, 50, 75, 100]


def test_outliers_have_reasons():
    random = np.random.RandomState(0)
    labels = np.repeat([0, 1, 2], [300, 300, 4])
    distances = random.uniform(1, 1.2, 604).astype(np.float32)
    distances[[7, 450]] = [3, 1.9]
    found = subset.outliers(labels, distances, 3)
    assert list(found) == [7, 450, 600, 601, 602, 603]
    assert found[7].startswith("distance 3 from the centre of cluster 0, whose bound is 1.")
    assert found[603] == "cluster 2 has only 4 rows"
    # Copies of one row have no deviation: what is hardly farther than they are is no outlier.
    copies = np.where(np.arange(100) < 90, 1, 1.02).astype(np.float32)
    assert subset.outliers(np.zeros(100, int), copies, 1) == {}
    assert list(subset.outliers(np.zeros(100, int), np.where(np.arange(100) < 99, 1, 2.0), 1)) == [99]
