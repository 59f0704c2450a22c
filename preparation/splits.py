"""Who gets which image: training or validation, and which hospital. Lists of datasets.Photo in, lists of Photo out."""

import numpy as np

VALIDATION = (
    0.2,
) * 5  # part of grades 0..4 that is held out where the published set has no validation part
# The thesis's draw from the 6,266 healthy and 6,256 diseased images of OIA-DDR leaves 5,060 and 4,940 to train on, ...
BALANCED = (1 - 5060 / 6266,) + (1 - 4940 / 6256,) * 4
# ... and its non-IID split gives so many of them to workers 1, 2 and 3.
THESIS_HEALTHY, THESIS_DISEASED = (
    np.array([3000, 1000, 1060]) / 5060,
    np.array([500, 300, 4140]) / 4940,
)


def choose_validation(photos, balanced, rng):
    """(train, val): the published parts where there are any, else a part of each grade; no patient is in both."""
    published = any(photo.part for photo in photos) and not balanced
    if published:
        patients = {photo.patient for photo in photos if photo.part == "val"}
    else:
        patients = hold_out(photos, BALANCED if balanced else VALIDATION, rng)
    val = [p for p in photos if p.patient in patients and (p.part == "val" or not published)]
    train = [
        p for p in photos if p.patient not in patients and (p.part == "train" or not published)
    ]
    if not train or not val:
        raise ValueError(
            f"found {len(train)} images to train on and {len(val)} to validate: expected some of each"
        )
    return train, val


def hold_out(photos, parts, rng):
    """The set of patients who make up parts[grade] of the images of each grade; a patient counts as the worst image."""
    patients = {}
    for photo in photos:
        patients.setdefault(photo.patient, []).append(photo.grade)
    chosen, due = set(), 0.0
    for grade, part in enumerate(parts):
        group = [patient for patient, grades in patients.items() if max(grades) == grade]
        due += part * sum(
            len(patients[patient]) for patient in group
        )  # what rounding left over is carried on
        for i in rng.permutation(len(group)):
            if due < 0.5:
                break
            chosen.add(group[i])
            due -= len(patients[group[i]])
    return chosen


def split(photos, how, num_clients, rng, alpha=0.5, share=0):
    """Divide training photos among clients: "iid", "noniid" or "dirichlet"; then add `share` of them to every client.

    noniid: the thesis's, for three clients. dirichlet: of each grade, parts from Dirichlet(alpha) (Hsu et al. 2019).
    The shared images (Zhao et al. 2018) are in the grades' proportions, and taken out before the division.
    """
    if share + num_clients > len(photos):
        raise ValueError(
            f"{len(photos)} training images are too few for {share} shared ones and {num_clients} clients"
        )
    # Shuffled, then ordered by grade: every n-th one of these is a fair sample.
    photos = sorted(
        (photos[i] for i in rng.permutation(len(photos))), key=lambda photo: photo.grade
    )
    common = set(np.linspace(0, len(photos) - 1, share).round().astype(int).tolist())
    shared = [photos[i] for i in sorted(common)]
    photos = [photo for i, photo in enumerate(photos) if i not in common]
    fewest, attempts = (
        (min(10, max(1, len(photos) // (4 * num_clients))), 1000) if how == "dirichlet" else (1, 1)
    )
    for _ in range(attempts):
        clients = divide(photos, how, num_clients, rng, alpha)
        if min(map(len, clients)) >= fewest:
            return [client + shared for client in clients]
    if how == "dirichlet":
        raise ValueError(
            f"alpha {alpha} leaves a client with fewer than {fewest} images 1000 times: take a larger one"
        )
    raise ValueError(
        f"worker{clients.index([]) + 1} would get none of {len(photos)} images: take fewer clients"
    )


def divide(photos, how, num_clients, rng, alpha):
    if how == "iid":
        return [photos[first::num_clients] for first in range(num_clients)]
    clients = [[] for _ in range(num_clients)]
    for grades in ((0,), (1, 2, 3, 4)) if how == "noniid" else ((0,), (1,), (2,), (3,), (4,)):
        group = [photo for photo in photos if photo.grade in grades]
        thesis = THESIS_DISEASED if grades[0] else THESIS_HEALTHY
        parts = thesis if how == "noniid" else rng.dirichlet([alpha] * num_clients)
        ends = np.round(np.cumsum(parts)[:-1] * len(group)).astype(int)
        for client, chosen in zip(
            clients, np.split(rng.permutation(len(group)), ends), strict=True
        ):
            client += [group[i] for i in chosen]
    return clients
