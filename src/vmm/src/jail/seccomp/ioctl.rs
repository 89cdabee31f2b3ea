//! The requests that libkrun makes: to KVM (`krun-vmm` 1.19.7, src/linux/vstate.rs and src/device_manager/kvm,
//! `krun-arch` src/x86_64, `krun-devices` src/legacy) and to taps (`krun-devices` src/virtio/net/tap.rs). Numbers and
//! sizes are those of `linux/kvm.h` and `linux/if_tun.h`.
//!
//! The order is that of the filter's comparisons, and KVM_RUN is what a guest makes most of.

/// Direction bits of a request (`asm-generic/ioctl.h`).
const NONE: u64 = 0;
const WRITE: u64 = 1;
const READ: u64 = 2;

const fn request(direction: u64, number: u64, size: u64) -> u64 {
    const KVM: u64 = 0xae;
    direction << 30 | size << 16 | KVM << 8 | number
}

/// Requests of ioctl(2) that are allowed.
pub const REQUESTS: &[u64] = WIRED.split_at(WIRED.len() - TAP).0;

/// How many of [`WIRED`] are about taps; they stand at the end.
const TAP: usize = 3;

/// Requests that are allowed to a machine with network devices.
pub const WIRED: &[u64] = &[
    request(NONE, 0x80, 0),   // KVM_RUN
    request(NONE, 0x00, 0),   // KVM_GET_API_VERSION
    request(NONE, 0x01, 0),   // KVM_CREATE_VM
    request(NONE, 0x03, 0),   // KVM_CHECK_EXTENSION
    request(NONE, 0x04, 0),   // KVM_GET_VCPU_MMAP_SIZE
    request(NONE, 0x41, 0),   // KVM_CREATE_VCPU
    request(WRITE, 0x46, 32), // KVM_SET_USER_MEMORY_REGION
    request(WRITE, 0x76, 32), // KVM_IRQFD
    request(WRITE, 0x79, 64), // KVM_IOEVENTFD
    #[cfg(target_arch = "x86_64")]
    request(READ | WRITE, 0x02, 4), // KVM_GET_MSR_INDEX_LIST
    #[cfg(target_arch = "x86_64")]
    request(READ | WRITE, 0x05, 8), // KVM_GET_SUPPORTED_CPUID
    #[cfg(target_arch = "x86_64")]
    request(NONE, 0x47, 0), // KVM_SET_TSS_ADDR
    #[cfg(target_arch = "x86_64")]
    request(NONE, 0x60, 0), // KVM_CREATE_IRQCHIP
    #[cfg(target_arch = "x86_64")]
    request(NONE, 0x71, 0), // KVM_REINJECT_CONTROL
    #[cfg(target_arch = "x86_64")]
    request(WRITE, 0x77, 64), // KVM_CREATE_PIT2
    #[cfg(target_arch = "x86_64")]
    request(WRITE, 0x82, 144), // KVM_SET_REGS
    #[cfg(target_arch = "x86_64")]
    request(READ, 0x83, 312), // KVM_GET_SREGS
    #[cfg(target_arch = "x86_64")]
    request(WRITE, 0x84, 312), // KVM_SET_SREGS
    #[cfg(target_arch = "x86_64")]
    request(WRITE, 0x89, 8), // KVM_SET_MSRS
    #[cfg(target_arch = "x86_64")]
    request(WRITE, 0x8d, 416), // KVM_SET_FPU
    #[cfg(target_arch = "x86_64")]
    request(READ, 0x8e, 1024), // KVM_GET_LAPIC
    #[cfg(target_arch = "x86_64")]
    request(WRITE, 0x8f, 1024), // KVM_SET_LAPIC
    #[cfg(target_arch = "x86_64")]
    request(WRITE, 0x90, 8), // KVM_SET_CPUID2
    #[cfg(target_arch = "aarch64")]
    request(WRITE, 0xa3, 104), // KVM_ENABLE_CAP
    #[cfg(target_arch = "aarch64")]
    request(WRITE, 0xab, 16), // KVM_GET_ONE_REG
    #[cfg(target_arch = "aarch64")]
    request(WRITE, 0xac, 16), // KVM_SET_ONE_REG
    #[cfg(target_arch = "aarch64")]
    request(WRITE, 0xae, 32), // KVM_ARM_VCPU_INIT
    #[cfg(target_arch = "aarch64")]
    request(READ, 0xaf, 32), // KVM_ARM_PREFERRED_TARGET
    #[cfg(target_arch = "aarch64")]
    request(READ | WRITE, 0xb0, 8), // KVM_GET_REG_LIST
    #[cfg(target_arch = "aarch64")]
    request(WRITE, 0xc2, 4), // KVM_ARM_VCPU_FINALIZE
    #[cfg(target_arch = "aarch64")]
    request(READ | WRITE, 0xe0, 12), // KVM_CREATE_DEVICE
    #[cfg(target_arch = "aarch64")]
    request(WRITE, 0xe1, 24), // KVM_SET_DEVICE_ATTR
    #[cfg(target_arch = "aarch64")]
    request(WRITE, 0xe3, 24), // KVM_HAS_DEVICE_ATTR
    0x8008_1272,              // BLKGETSIZE64: of disks that are block devices (`imago` 0.2.6, src/file.rs)
    0x1268,                   // BLKSSZGET: the same
    0x5401,                   // TCGETS: whether the console is a terminal
    0x4004_54ca,              // TUNSETIFF
    0x4004_54d8,              // TUNSETVNETHDRSZ
    0x4004_54d0,              // TUNSETOFFLOAD
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_stand_at_the_end() {
        let tap = |request: &u64| request >> 8 & 0xff == u64::from(b'T') && *request != 0x5401;
        assert_eq!(WIRED.iter().filter(|r| tap(r)).count(), TAP);
        assert!(!REQUESTS.iter().any(tap));
    }
}
