"""Who gets which image: training or validation, and which hospital.

Everything here takes and gives lists of datasets.Photo.
"""

import numpy as np

# Part of the images of grades 0..4 that is held out where the published set has no validation part.
VALIDATION = (0.2, 0.2, 0.2, 0.2, 0.2)
# The thesis draws its training set from 6,266 healthy and 6,256 diseased images of OIA-DDR:
# 5,060 and 4,940 are left to train on.
BALANCED = (1 - 5060 / 6266,) + (1 - 4940 / 6256,) * 4
# Its non-IID split deals these parts of them to workers 1, 2 and 3.
THESIS_HEALTHY = np.array([3000, 1000, 1060]) / 5060
THESIS_DISEASED = np.array([500, 300, 4140]) / 4940
# With a small alpha a Dirichlet draw can leave a client (nearly) nothing: then it is drawn again.
DIRICHLET_ATTEMPTS = 1000


def choose_validation(photos, balanced, rng):
    """(train, val): the published parts where there are any, else a part of each grade.

    No patient is in both. balanced: the thesis's draw, which mixes the published parts.
    Raises ValueError where one of the two is without images.
    """
    has_parts = any(photo.part for photo in photos)
    if has_parts and not balanced:
        train, val = published_parts(photos)
    else:
        held_out = hold_out(photos, BALANCED if balanced else VALIDATION, rng)
        train = [photo for photo in photos if photo.patient not in held_out]
        val = [photo for photo in photos if photo.patient in held_out]
    if not train or not val:
        raise ValueError(
            f"found {len(train)} images to train on and {len(val)} to validate: expected some of "
            "each"
        )
    return train, val


def published_parts(photos):
    """(train, val) as published; a patient who is in both is taken out of training."""
    val = [photo for photo in photos if photo.part == "val"]
    val_patients = {photo.patient for photo in val}
    train = [
        photo for photo in photos if photo.part == "train" and photo.patient not in val_patients
    ]
    return train, val


def hold_out(photos, parts, rng):
    """The set of patients who make up parts[grade] of the images of each grade.

    A patient counts by the worst grade.
    """
    grades_of = {}
    for photo in photos:
        grades_of.setdefault(photo.patient, []).append(photo.grade)
    chosen = set()
    due = 0.0  # images still to be held out; what rounding leaves over is carried to the next grade
    for grade, part in enumerate(parts):
        group = [patient for patient, grades in grades_of.items() if max(grades) == grade]
        due += part * sum(len(grades_of[patient]) for patient in group)
        for i in rng.permutation(len(group)):
            if due < 0.5:
                break
            chosen.add(group[i])
            due -= len(grades_of[group[i]])
    return chosen


def split(photos, how, num_clients, rng, alpha=0.5, share=0):
    """Split training photos among clients; a list for each client.

    how: "hospitals", "iid", "noniid" or "dirichlet". hospitals: by Photo.hospital (see
    deal_hospitals).
    noniid: the thesis's, for three clients. dirichlet: of each grade, parts from Dirichlet(alpha)
    (Hsu et al. 2019). share: so many images (Zhao et al. 2018), in the grades' proportions, are taken
    out before the split and given to every client.
    Raises ValueError where a client would get too few.
    """
    if share + num_clients > len(photos):
        raise ValueError(
            f"{len(photos)} training images are too few for {share} shared ones and {num_clients} "
            "clients"
        )
    # Shuffled, then ordered by grade: every n-th one of these is a fair sample.
    shuffled = [photos[i] for i in rng.permutation(len(photos))]
    by_grade = sorted(shuffled, key=lambda photo: photo.grade)
    common = set(np.linspace(0, len(photos) - 1, share).round().astype(int).tolist())
    shared = [by_grade[i] for i in sorted(common)]
    own = [photo for i, photo in enumerate(by_grade) if i not in common]
    clients = deal_enough(own, how, num_clients, rng, alpha)
    return [client + shared for client in clients]


def deal_enough(photos, how, num_clients, rng, alpha):
    """What `deal` gives, if every client has enough of it; ValueError otherwise."""
    if how != "dirichlet":
        clients = deal(photos, how, num_clients, rng, alpha)
        if [] in clients:
            raise ValueError(
                f"worker{clients.index([]) + 1} would get none of {len(photos)} images: take fewer "
                "clients"
            )
        return clients
    fewest = min(10, max(1, len(photos) // (4 * num_clients)))
    for _ in range(DIRICHLET_ATTEMPTS):
        clients = deal(photos, how, num_clients, rng, alpha)
        if min(map(len, clients)) >= fewest:
            return clients
    raise ValueError(
        f"alpha {alpha} leaves a client with fewer than {fewest} images {DIRICHLET_ATTEMPTS} times: "
        "take a larger one"
    )


def deal(photos, how, num_clients, rng, alpha):
    """Deal photos, ordered by grade, among clients: a list for each."""
    if how == "hospitals":
        return deal_hospitals(photos, num_clients)
    if how == "iid":
        return [photos[first::num_clients] for first in range(num_clients)]
    groups = ((0,), (1, 2, 3, 4)) if how == "noniid" else ((0,), (1,), (2,), (3,), (4,))
    clients = [[] for _ in range(num_clients)]
    for grades in groups:
        group = [photo for photo in photos if photo.grade in grades]
        if how == "dirichlet":
            parts = rng.dirichlet([alpha] * num_clients)
        else:
            parts = THESIS_HEALTHY if grades == (0,) else THESIS_DISEASED
        ends = np.round(np.cumsum(parts)[:-1] * len(group)).astype(int)
        hands = np.split(rng.permutation(len(group)), ends)
        for client, hand in zip(clients, hands, strict=True):
            client += [group[i] for i in hand]
    return clients


def deal_hospitals(photos, num_clients):
    """Deal whole hospitals among clients: a list for each.

    Clients take the hospitals in turn. Where there are more clients than hospitals, those of the
    same hospital share its patients; where there are fewer, a client has several hospitals.
    """
    # `photos` come ordered by grade, which would make the order of the hospitals depend on chance.
    by_name = sorted(photos, key=lambda photo: photo.name)
    names = list(dict.fromkeys(photo.hospital for photo in by_name))
    clients = [[] for _ in range(num_clients)]
    for number, name in enumerate(names):
        own = [photo for photo in photos if photo.hospital == name]
        owners = clients[number :: len(names)] or [clients[number % num_clients]]
        for first, owner in enumerate(owners):
            owner += own[first :: len(owners)]
    return clients
