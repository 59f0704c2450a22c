"""Who gets which image: training or validation, and which hospital.

Everything here takes and gives lists of datasets.Photo, and deals whole patients: the two eyes of
one patient are alike, so that one to train on would tell the network about the other. A patient
counts by the worst grade.
"""

from typing import NamedTuple

import numpy as np

# Part of the images that is held out where the published set has no validation part.
VALIDATION = 0.2
# The thesis draws its training set from 6,266 healthy and 6,256 diseased images of OIA-DDR:
# 5,060 and 4,940 are left to train on. So it holds out these parts of grades 0..4.
BALANCED = (1 - 5060 / 6266,) + (1 - 4940 / 6256,) * 4
# Its non-IID split deals these parts of them to workers 1, 2 and 3.
THESIS_HEALTHY = np.array([3000, 1000, 1060]) / 5060
THESIS_DISEASED = np.array([500, 300, 4140]) / 4940
# With a small alpha a Dirichlet draw can leave a client (nearly) nothing: then it is drawn again.
DIRICHLET_ATTEMPTS = 1000


class Patient(NamedTuple):
    """All photos of one patient."""

    grade: int  # the worst
    photos: list


def group_patients(photos):
    """A list of Patient, in the order of their first photos."""
    groups = {}
    for photo in photos:
        groups.setdefault(photo.patient, []).append(photo)
    return [Patient(max(photo.grade for photo in own), own) for own in groups.values()]


def photos_of(patients):
    """All photos of a list of Patient."""
    return [photo for patient in patients for photo in patient.photos]


def join_identical(photos, digests, can_be_read):
    """(photos, lists of those that are copies of each other, by the `digests` of their files).

    A photograph is of one patient, whatever it is called: so the patients of its copies are made
    one, and lie on one side. can_be_read: whether a Photo is one: empty files, or an error page
    that was saved under many names, are nobody's.
    """
    by_digest = {}
    for photo, digest in zip(photos, digests, strict=True):
        by_digest.setdefault(digest, []).append(photo)
    copies = [same for same in by_digest.values() if len(same) > 1 and can_be_read(same[0])]
    joined = {}  # patient -> the patient whose images they are, too

    def who(photo):
        patient = photo.patient
        while patient in joined:
            patient = joined[patient]
        return patient

    for first, *others in copies:
        for other in others:
            if who(other) != who(first):
                joined[who(other)] = who(first)
    return [photo._replace(patient=who(photo)) for photo in photos], copies


def settle_parts(photos, val_part):
    """(photos, sentences): each has the part "train", "val" or "", and a patient has one part.

    The published test part is for a final test and left out, unless the set has no other part to
    validate on. A patient of the training part is trained on with all images. val_part: what the
    user said of the part to validate on; 1 takes all.
    """
    parts = {photo.part for photo in photos}
    if parts <= {""} or val_part == 1:
        return photos, []
    sentences = []
    if val_part is None and "val" not in parts:
        photos = [photo._replace(part=photo.part.replace("test", "val")) for photo in photos]
    train = {photo.patient for photo in photos if photo.part == "train"}
    moved = {photo for photo in photos if photo.part != "train" and photo.patient in train}
    if moved:
        num_patients = len({photo.patient for photo in moved})
        sentences.append(
            f"patients in two parts, training and another: {num_patients}; their images in the "
            f"other, {len(moved)}, are trained on, too"
        )
    photos = [photo._replace(part="train") if photo in moved else photo for photo in photos]
    kept = [photo for photo in photos if photo.part != "test"]
    if len(kept) < len(photos):
        sentences.append(
            f"{len(photos) - len(kept)} images of the published test part are left alone, to test "
            "with at the end"
        )
    if val_part is not None:
        sentences.append("--val-part decides: the parts that the data set itself tells do not")
    return kept, sentences


def choose_validation(photos, balanced, rng, val_part=None):
    """(train, val): the parts that the data set tells, else a part of each grade.

    No patient is in both. balanced: the thesis's draw, which mixes the published parts. val_part:
    the part to hold out, 0..1, whatever is published; of 0 and 1 one of the two is empty. Raises
    ValueError where one of the two is without images otherwise.
    """
    if any(photo.part for photo in photos) and not balanced and val_part is None:
        held_out = {photo.patient for photo in photos if photo.part == "val"}
    else:
        parts = BALANCED if balanced else (VALIDATION if val_part is None else val_part,) * 5
        held_out = hold_out(photos, parts, rng)
    train = [photo for photo in photos if photo.patient not in held_out]
    val = [photo for photo in photos if photo.patient in held_out]
    if (not train and val_part != 1) or (not val and val_part != 0):
        raise ValueError(
            f"found {len(train)} images to train on and {len(val)} to validate: expected some of "
            "each (--val-part says which part validates, 0 for none)"
        )
    return train, val


def hold_out(photos, parts, rng):
    """The set of patients (their names) who make up parts[grade] of the images of each grade."""
    patients = group_patients(photos)
    chosen = set()
    due = 0.0  # images still to be held out; what rounding leaves over is carried to the next grade
    for grade, part in enumerate(parts):
        group = [patient for patient in patients if patient.grade == grade]
        due += part * len(photos_of(group))
        for i in rng.permutation(len(group)):
            if due < 0.5:
                break
            chosen.add(group[i].photos[0].patient)
            due -= len(group[i].photos)
    return chosen


def split(photos, how, num_clients, rng, alpha=0.5, share=0):
    """Split training photos among clients; a list for each client.

    how: "hospitals", "column", "iid", "noniid" or "dirichlet". hospitals, column: by Photo.hospital
    (see deal_hospitals).
    noniid: the thesis's, for three clients. dirichlet: of each grade, parts from Dirichlet(alpha)
    (Hsu et al. 2019). share: so many images (Zhao et al. 2018), in the grades' proportions, are
    taken out before the split and given to every client; whole patients, so it can be some more or
    less. Raises ValueError where a client would get too few.
    """
    patients = group_patients(photos)
    num_shared = round(share * len(patients) / len(photos))
    if num_shared + num_clients > len(patients):
        of_patients = f" of {len(patients)} patients" if len(patients) < len(photos) else ""
        raise ValueError(
            f"{len(photos)} training images{of_patients} are too few for {share} shared ones and "
            f"{num_clients} clients"
        )
    # Shuffled, then ordered by grade: every n-th one of these is a fair sample.
    shuffled = [patients[i] for i in rng.permutation(len(patients))]
    by_grade = sorted(shuffled, key=lambda patient: patient.grade)
    common = set(np.linspace(0, len(patients) - 1, num_shared).round().astype(int).tolist())
    shared = photos_of(by_grade[i] for i in sorted(common))
    own = [patient for i, patient in enumerate(by_grade) if i not in common]
    clients = deal_enough(own, how, num_clients, rng, alpha)
    return [photos_of(client) + shared for client in clients]


def deal_enough(patients, how, num_clients, rng, alpha):
    """What `deal` gives, if every client has enough of it; ValueError otherwise."""
    num_photos = len(photos_of(patients))
    is_drawn = how == "dirichlet"  # and can be drawn again
    fewest = min(10, max(1, num_photos // (4 * num_clients))) if is_drawn else 1
    for _ in range(DIRICHLET_ATTEMPTS if is_drawn else 1):
        clients = deal(patients, how, num_clients, rng, alpha)
        if min(len(photos_of(client)) for client in clients) >= fewest:
            return clients
    raise ValueError(
        f"a client would get fewer than {fewest} of {num_photos} images: take fewer clients"
        f"{' or a larger --alpha' if is_drawn else ''}"
    )


def deal(patients, how, num_clients, rng, alpha):
    """Deal patients, ordered by grade, among clients: a list of Patient for each."""
    if how in ("hospitals", "column"):
        return deal_hospitals(patients, num_clients, by_name=how == "column")
    if how == "iid":
        return deal_evenly(patients, num_clients)
    groups = ((0,), (1, 2, 3, 4)) if how == "noniid" else ((0,), (1,), (2,), (3,), (4,))
    clients = [[] for _ in range(num_clients)]
    for grades in groups:
        group = [patient for patient in patients if patient.grade in grades]
        if how == "dirichlet":
            parts = rng.dirichlet([alpha] * num_clients)
        else:
            parts = THESIS_HEALTHY if grades == (0,) else THESIS_DISEASED
        order = rng.permutation(len(group))
        # Cut where the images, not the patients, are the parts.
        num_photos = [len(group[i].photos) for i in order]
        wanted = np.round(np.cumsum(parts)[:-1] * sum(num_photos))
        cuts = np.searchsorted(np.cumsum(num_photos), wanted, side="right")
        for client, chosen in zip(clients, np.split(order, cuts), strict=True):
            client += [group[i] for i in chosen]
    return clients


def deal_evenly(patients, num_clients):
    """Each patient to the client with the fewest images so far, the first of those that have.

    Where every patient has one image, that is every n-th patient to each.
    """
    clients = [[] for _ in range(num_clients)]
    sizes = [0] * num_clients
    for patient in patients:
        fewest = sizes.index(min(sizes))
        clients[fewest].append(patient)
        sizes[fewest] += len(patient.photos)
    return clients


def deal_hospitals(patients, num_clients, by_name):
    """Deal whole hospitals among clients: a list of Patient for each.

    Clients take the hospitals in turn, by_name or in the order of their first photographs' names.
    Where there are more clients than hospitals, those of the same hospital share its patients;
    where there are fewer, a client has several hospitals. A patient of two hospitals goes to one.
    """
    # Not as they come: `patients` are ordered by grade, so that chance would order the hospitals.
    photos = sorted(photos_of(patients), key=lambda photo: photo.name)
    names = list(dict.fromkeys(photo.hospital for photo in photos))
    if by_name:
        names.sort()
    clients = [[] for _ in range(num_clients)]
    for number, name in enumerate(names):
        own = [patient for patient in patients if patient.photos[0].hospital == name]
        owners = clients[number :: len(names)] or [clients[number % num_clients]]
        for owner, hand in zip(owners, deal_evenly(own, len(owners)), strict=True):
            owner += hand
    return clients
