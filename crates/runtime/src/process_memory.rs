//! Memory use of this process, from the kernel's accounting.

/// Resident memory of this process in bytes; 0 if the system does not say.
#[must_use]
pub fn resident_bytes() -> u64 {
    field("/proc/self/status", "VmRSS:")
}

/// Peak resident memory of this process in bytes; 0 if the system does not say.
#[must_use]
pub fn peak_resident_bytes() -> u64 {
    field("/proc/self/status", "VmHWM:")
}

/// Memory of this machine that processes can still allocate, in bytes; 0 if the system does not say.
#[must_use]
pub fn available_bytes() -> u64 {
    field("/proc/meminfo", "MemAvailable:")
}

fn field(file: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kibibytes = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_that_is_touched_is_counted() {
        let before = resident_bytes();
        let held = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(resident_bytes() >= before + (60 << 20));
        assert!(peak_resident_bytes() >= resident_bytes() && available_bytes() > 0);
        drop(held);
    }
}
