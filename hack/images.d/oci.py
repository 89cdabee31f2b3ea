"""Writes OCI images as archives that `ctr image import` reads. Standard library only.

    Layer      a tar that is written entry by entry, in memory or on disk, plain or gzip
    archive    layers + configuration -> one tar: oci-layout, index.json, blobs/sha256/…
    archives   the same for several images
    registry   several images -> the directory that a registry serves

Everything is reproducible: times are zero unless an entry brings its own, owners are numbers.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile

MEDIA = "application/vnd.oci.image."


class Layer:
    """One layer. `add` appends an entry; `finish` closes it, after which only `archive` has use for it."""

    def __init__(self, compress=False):
        self.blob = tempfile.TemporaryFile()
        self.compress = compress
        self.tar = tarfile.open(fileobj=self.blob, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, name, data=None, *, kind=None, mode=None, uid=0, gid=0, link=None, xattrs=None):
        """A regular file when there is `data`, a link when there is `link` (symbolic unless `kind` says), else a
        directory."""
        entry = tarfile.TarInfo(name)
        if data is not None:
            entry.type, entry.size, entry.mode = tarfile.REGTYPE, len(data), 0o644
        elif link is not None:
            entry.type, entry.linkname, entry.mode = kind or tarfile.SYMTYPE, link, 0o777
        else:
            entry.type, entry.mode = kind or tarfile.DIRTYPE, 0o755
        entry.mode = entry.mode if mode is None else mode
        entry.uid, entry.gid = uid, gid
        entry.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
        self.copy(entry, io.BytesIO(data) if data is not None else None)

    def copy(self, entry, data):
        """An entry of another tar."""
        entry.uname = entry.gname = ""
        self.tar.addfile(entry, data)

    def finish(self):
        self.tar.close()
        self.diff_id = digest(self.blob)
        if self.compress:
            plain, self.blob = self.blob, tempfile.TemporaryFile()
            plain.seek(0)
            with gzip.GzipFile(fileobj=self.blob, mode="wb", mtime=0, filename="") as out:
                shutil.copyfileobj(plain, out)
        self.digest = digest(self.blob)
        return self


def digest(blob):
    blob.seek(0)
    value = hashlib.file_digest(blob, "sha256").hexdigest()
    return f"sha256:{value}"


class Store:
    """The blobs of images, by digest; layers that several images have are there once."""

    def __init__(self):
        self.blobs = {}

    def put(self, value):
        """Keeps `value` as JSON; returns its descriptor without a media type."""
        data = json.dumps(value, indent=1).encode()
        key = digest(io.BytesIO(data))
        self.blobs[key] = io.BytesIO(data)
        return {"digest": key, "size": len(data)}

    def image(self, layers, config):
        """Keeps an image; returns its manifest's descriptor. `config` has the fields of an OCI image configuration's
        `config`."""
        for layer in layers:
            self.blobs[layer.digest] = layer.blob
        configuration = self.put(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": config,
                "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
                "history": [{"created_by": f"layer {n}"} for n in range(len(layers))],
            }
        )
        manifest = self.put(
            {
                "schemaVersion": 2,
                "mediaType": MEDIA + "manifest.v1+json",
                "config": {"mediaType": MEDIA + "config.v1+json", **configuration},
                "layers": [
                    {
                        "mediaType": MEDIA + "layer.v1.tar" + ("+gzip" if layer.compress else ""),
                        "digest": layer.digest,
                        "size": layer.blob.seek(0, io.SEEK_END),
                    }
                    for layer in layers
                ],
            }
        )
        return {"mediaType": MEDIA + "manifest.v1+json", **manifest}


def archive(path, name, layers, **config):
    """Writes the image `name` to `path`."""
    archives(path, {name: (layers, config)})


def archives(path, images):
    """Writes several images, name -> (layers, config), to one archive."""
    store = Store()
    index = {
        "schemaVersion": 2,
        "mediaType": MEDIA + "index.v1+json",
        "manifests": [
            {
                **store.image(layers, config),
                "annotations": {
                    "io.containerd.image.name": name,
                    "org.opencontainers.image.ref.name": name.rpartition(":")[2],
                },
                "platform": {"architecture": "amd64", "os": "linux"},
            }
            for name, (layers, config) in images.items()
        ],
    }
    files = {
        "oci-layout": io.BytesIO(b'{"imageLayoutVersion": "1.0.0"}'),
        "index.json": io.BytesIO(json.dumps(index, indent=1).encode()),
        **{"blobs/" + key.replace(":", "/"): blob for key, blob in store.blobs.items()},
    }
    with tarfile.open(path, "w") as out:
        for file, blob in files.items():
            entry = tarfile.TarInfo(file)
            entry.size = blob.seek(0, io.SEEK_END)
            blob.seek(0)
            out.addfile(entry, blob)


def registry(root, images):
    """Writes images, name -> (layers, config), as the directory of a registry (distribution's "filesystem" driver). A
    registry does not know under which host's name it is asked, so that part of a name does not count."""
    store = Store()
    root = os.path.join(root, "docker/registry/v2")

    def write(path, data):
        path = os.path.join(root, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            shutil.copyfileobj(data, file)

    def link(path, target):
        write(f"{path}/link", io.BytesIO(target.encode()))

    for name, (layers, config) in images.items():
        repository, _, tag = name.partition("/")[2].rpartition(":")
        at = f"repositories/{repository}"
        manifest = store.image(layers, config)["digest"]
        configuration = json.loads(store.blobs[manifest].getvalue())["config"]["digest"]
        for key in (configuration, *(layer.digest for layer in layers)):
            link(f"{at}/_layers/" + key.replace(":", "/"), key)
        key = manifest.replace(":", "/")
        link(f"{at}/_manifests/revisions/{key}", manifest)
        link(f"{at}/_manifests/tags/{tag}/current", manifest)
        link(f"{at}/_manifests/tags/{tag}/index/{key}", manifest)
    for key, blob in store.blobs.items():
        kind, value = key.split(":")
        blob.seek(0)
        write(f"blobs/{kind}/{value[:2]}/{value}/data", blob)
