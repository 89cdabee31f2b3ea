"""The image nacelle.test/debian-tools: debian_tools.py OUTPUT TREE.tar

TREE.tar is a Debian tree with packet filters, ACL tools and util-linux. Layers:

    1  tree      TREE.tar
    2  acl       /acl: a directory with a default ACL, and a file in it that user 1000 may read besides its owner
"""

import struct
import sys
import tarfile

import oci
from debian_python import base_layer, entries

# POSIX ACLs as they are kept in extended attributes (linux/posix_acl_xattr.h): version 2, then tag, permissions, id.
USER_OBJ, USER, GROUP_OBJ, MASK, OTHER, NOBODY = 0x01, 0x02, 0x04, 0x10, 0x20, 0xFFFFFFFF


def acl(*entries):
    data = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    # An attribute's value in a tar header is bytes; tarfile takes them in this disguise.
    return data.decode("utf-8", "surrogateescape")


def acl_layer():
    for_user = acl((USER_OBJ, 6, NOBODY), (USER, 4, 1000), (GROUP_OBJ, 0, NOBODY), (MASK, 4, NOBODY), (OTHER, 0, NOBODY))
    inherited = acl((USER_OBJ, 7, NOBODY), (USER, 7, 1000), (GROUP_OBJ, 5, NOBODY), (MASK, 7, NOBODY), (OTHER, 5, NOBODY))
    layer = oci.Layer()
    layer.add("acl", xattrs={"system.posix_acl_default": inherited})
    layer.add("acl/file", b"for user 1000\n", mode=0o640, xattrs={"system.posix_acl_access": for_user})
    return layer


def main(output, tree):
    with tarfile.open(tree) as tar:
        layers = [base_layer(tar, entries(tar)), acl_layer()]
    oci.archive(
        output,
        "nacelle.test/debian-tools:latest",
        [layer.finish() for layer in layers],
        Env=["PATH=/usr/local/bin:/usr/bin:/usr/sbin", "LANG=C.UTF-8"],
        Cmd=["bash"],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
