"""Who gets which image: training or validation, and which hospital. Lists of datasets.Photo in, lists of Photo out."""

import numpy as np

VALIDATION = (0.2,) * 5  # part of grades 0..4 that is held out where the published set has no validation part
# The thesis's draw from the 6,266 healthy and 6,256 diseased images of OIA-DDR leaves 5,060 and 4,940 to train on, ...
BALANCED = (1 - 5060 / 6266,) + (1 - 4940 / 6256,) * 4
# ... and its non-IID split gives so many of them to workers 1, 2 and 3.
THESIS_HEALTHY, THESIS_DISEASED = np.array([3000, 1000, 1060]) / 5060, np.array([500, 300, 4140]) / 4940


def choose_validation(photos, balanced, rng):
    """(train, val) lists: the published parts where there are any, else a part of each grade, held out by patient.

    A patient of the validation part is taken out of the training part; the published test part is left alone.
    """
    if balanced or not any(photo.part for photo in photos):
        held_out = hold_out(photos, BALANCED if balanced else VALIDATION, rng)
        train, val = [p for p in photos if p.patient not in held_out], [p for p in photos if p.patient in held_out]
    else:
        val = [photo for photo in photos if photo.part == "val"]
        patients = {photo.patient for photo in val}
        train = [photo for photo in photos if photo.part == "train" and photo.patient not in patients]
    if not train or not val:
        raise ValueError(f"found {len(train)} images to train on and {len(val)} to validate: expected some of each")
    return train, val


def hold_out(photos, parts, rng):
    """The set of patients who make up parts[grade] of the images of each grade; a patient counts as the worst image."""
    patients = {}
    for photo in photos:
        patients.setdefault(photo.patient, []).append(photo)
    worst = {patient: max(photo.grade for photo in theirs) for patient, theirs in patients.items()}
    chosen, due = set(), 0.0
    for grade, part in enumerate(parts):
        group = [patient for patient in patients if worst[patient] == grade]
        due += part * sum(len(patients[patient]) for patient in group)  # what rounding left over is carried on
        for i in rng.permutation(len(group)):
            if due < 0.5:
                break
            chosen.add(group[i])
            due -= len(patients[group[i]])
    return chosen


def split(photos, how, num_clients, rng, alpha=0.5, share=0):
    """Divide training photos among clients: "iid", "noniid" or "dirichlet"; then add `share` of them to every client.

    iid: every client gets the grades in the same proportions. noniid: the thesis's, for three clients. dirichlet:
    of each grade the clients get parts drawn from Dirichlet(alpha), more unequal for a smaller alpha (Hsu et al. 2019).
    The shared images (Zhao et al. 2018) have the grades' proportions too and are taken out before the division.
    """
    if share + num_clients > len(photos):
        raise ValueError(f"{len(photos)} training images are too few for {share} shared ones and {num_clients} clients")
    photos = by_grade(photos, rng)
    common = set(np.linspace(0, len(photos) - 1, share).round().astype(int).tolist())
    shared = [photos[i] for i in sorted(common)]
    photos = [photo for i, photo in enumerate(photos) if i not in common]
    if how == "iid":
        clients = [photos[first::num_clients] for first in range(num_clients)]
    elif how == "noniid":
        healthy = deal([photo for photo in photos if photo.grade == 0], THESIS_HEALTHY, rng)
        diseased = deal([photo for photo in photos if photo.grade > 0], THESIS_DISEASED, rng)
        clients = [healthy[k] + diseased[k] for k in range(num_clients)]
    else:
        clients = split_dirichlet(photos, num_clients, rng, alpha)
    for number, client in enumerate(clients, start=1):
        if not client:
            raise ValueError(f"worker{number} would get none of {len(photos)} images: take fewer clients")
    return [client + shared for client in clients]


def split_dirichlet(photos, num_clients, rng, alpha):
    fewest = min(10, max(1, len(photos) // (4 * num_clients)))
    for _ in range(1000):
        clients = [[] for _ in range(num_clients)]
        for grade in range(5):
            graded = [photo for photo in photos if photo.grade == grade]
            for client, more in zip(clients, deal(graded, rng.dirichlet([alpha] * num_clients), rng), strict=True):
                client += more
        if min(map(len, clients)) >= fewest:
            return clients
    raise ValueError(f"alpha {alpha} leaves a client with fewer than {fewest} images 1000 times: take a larger --alpha")


def by_grade(photos, rng):
    """Shuffled, then ordered by grade: every n-th one of these is a fair sample."""
    return sorted((photos[i] for i in rng.permutation(len(photos))), key=lambda photo: photo.grade)


def deal(photos, parts, rng):
    """Shuffle photos into lists of these parts of them (numbers that add up to 1)."""
    ends = np.round(np.cumsum(parts)[:-1] * len(photos)).astype(int)
    return [[photos[i] for i in chosen] for chosen in np.split(rng.permutation(len(photos)), ends)]
