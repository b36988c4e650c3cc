//! The system calls that a program may make.

use std::collections::BTreeMap;

use nix::libc::{self, c_long};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// What computing, files, memory, threads, time and signals among one's own processes need. All that is not here is refused, so a
/// call that a newer kernel has is refused, too: sockets, mounts, namespaces, keyrings, `ptrace`, `io_uring`, `bpf`, handles of
/// files, memory of other processes, modules, message queues.
const ALLOWED: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_chdir,
    libc::SYS_fchdir,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_umask,
    libc::SYS_truncate,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fadvise64,
    libc::SYS_utimensat,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_copy_file_range,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_signalfd4,
    // Memory.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_mincore,
    libc::SYS_msync,
    libc::SYS_membarrier,
    libc::SYS_get_mempolicy,
    // Threads and processes of its own.
    libc::SYS_clone3,
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getpgid,
    libc::SYS_setpgid,
    libc::SYS_getsid,
    libc::SYS_setsid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_getgroups,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_getpriority,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    // Signals and time.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_setitimer,
    libc::SYS_getitimer,
    libc::SYS_timer_create,
    libc::SYS_timer_settime,
    libc::SYS_timer_gettime,
    libc::SYS_timer_getoverrun,
    libc::SYS_timer_delete,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_times,
    // Information about the system and the process.
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_getrlimit,
    libc::SYS_setrlimit,
    libc::SYS_prlimit64,
    libc::SYS_getcpu,
    libc::SYS_capget,
];

/// Older calls that the C library still makes on this processor.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_getdents,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_link,
    libc::SYS_symlink,
    libc::SYS_chmod,
    libc::SYS_creat,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_create,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd,
    libc::SYS_alarm,
    libc::SYS_pause,
    libc::SYS_time,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_getpgrp,
    libc::SYS_arch_prctl,
    libc::SYS_signalfd,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[c_long] = &[];

/// Calls that make a process and have no flags.
#[cfg(target_arch = "x86_64")]
const FORKS: &[c_long] = &[libc::SYS_fork, libc::SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const FORKS: &[c_long] = &[];

/// Controls of descriptors that an interpreter asks for: whether it is a terminal, what can be read, whether it blocks and is
/// inherited. Writing into a terminal's input is none of them.
const CONTROLS: [u64; 5] = [libc::TCGETS, libc::FIONREAD, libc::FIONBIO, libc::FIOCLEX, libc::FIONCLEX];

/// Settings of a process: its name, its name again, whether it can be looked into, and names of memory.
const SETTINGS: [u64; 4] =
    [libc::PR_SET_NAME as u64, libc::PR_GET_NAME as u64, libc::PR_GET_DUMPABLE as u64, libc::PR_SET_VMA as u64];

const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_PTRACE) as u64;

/// The filters, as the numbers of a program of the kernel's: of a program with one process the first two, of one with more the
/// others.
pub(crate) fn programs() -> Result<Vec<String>, String> {
    let of = |many| Ok::<_, String>(filters(many)?.map(|filter| hex(&filter)));
    Ok([of(false)?, of(true)?].concat())
}

/// Applies the filters of a program with several processes to this process, for good.
pub(crate) fn apply() -> Result<(), String> {
    filters(true)?.iter().try_for_each(|filter| seccompiler::apply_filter(filter).map_err(|error| error.to_string()))
}

/// The filters of a program, in the order in which they are applied; with `many` processes, too.
fn filters(many: bool) -> Result<[BpfProgram; 2], String> {
    // `clone3` has its flags in memory, where no filter looks: the C library uses `clone` when it is not there. The strictest
    // filter decides, so the list, which comes second because it does not allow further filters, may have it.
    let absent = SeccompAction::Errno(libc::ENOSYS as u32);
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    Ok([compiled(rules, SeccompAction::Allow, absent)?, allowed(many)?])
}

/// The list of what is allowed; with `many` processes, too.
fn allowed(many: bool) -> Result<BpfProgram, String> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in ALLOWED.iter().chain(ALLOWED_HERE) {
        rules.insert(*call, Vec::new());
    }
    let one_of = |argument: u8, values: &[u64]| {
        values.iter().map(|value| equals(argument, *value)).collect::<Result<Vec<_>, _>>()
    };
    rules.insert(libc::SYS_ioctl, one_of(1, &CONTROLS)?);
    rules.insert(libc::SYS_prctl, one_of(0, &SETTINGS)?);
    // Two ends of one's own, which event loops wake themselves with.
    rules.insert(libc::SYS_socketpair, vec![equals(0, libc::AF_UNIX as u64)?]);
    // Asking for the personality.
    rules.insert(libc::SYS_personality, vec![equals(0, 0xffff_ffff)?]);
    let clone = match many {
        true => {
            FORKS.iter().for_each(|call| drop(rules.insert(*call, Vec::new())));
            masked(0, NAMESPACES, 0)
        }
        false => masked(0, libc::CLONE_THREAD as u64 | NAMESPACES, libc::CLONE_THREAD as u64),
    };
    rules.insert(libc::SYS_clone, vec![clone?]);
    compiled(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}

fn equals(argument: u8, value: u64) -> Result<SeccompRule, String> {
    rule(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value))
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, String> {
    rule(SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), value))
}

fn rule(condition: Result<SeccompCondition, seccompiler::BackendError>) -> Result<SeccompRule, String> {
    let condition = condition.map_err(|error| error.to_string())?;
    SeccompRule::new(vec![condition]).map_err(|error| error.to_string())
}

fn compiled(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, String> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| error.to_string())?;
    let filter = SeccompFilter::new(rules, otherwise, matched, arch).map_err(|error| error.to_string())?;
    BpfProgram::try_from(filter).map_err(|error| error.to_string())
}

fn hex(program: &BpfProgram) -> String {
    let mut text = String::with_capacity(program.len() * 16);
    for instruction in program {
        let [c0, c1] = instruction.code.to_ne_bytes();
        let [k0, k1, k2, k3] = instruction.k.to_ne_bytes();
        for byte in [c0, c1, instruction.jt, instruction.jf, k0, k1, k2, k3] {
            text.push_str(&format!("{byte:02x}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_filter_for_this_processor() {
        let programs = programs().unwrap();
        assert_eq!(programs.len(), 4);
        assert!(programs.iter().all(|program| !program.is_empty() && program.len() % 16 == 0));
        assert_ne!(programs[1], programs[3]);
    }

    #[test]
    fn what_reaches_beyond_the_process_is_not_on_the_list() {
        let forbidden = [
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_pivot_root,
            libc::SYS_chroot,
            libc::SYS_keyctl,
            libc::SYS_add_key,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_open_by_handle_at,
            libc::SYS_memfd_create,
            libc::SYS_init_module,
            libc::SYS_kexec_load,
            libc::SYS_shmget,
            libc::SYS_mq_open,
            libc::SYS_setuid,
            libc::SYS_capset,
            libc::SYS_execveat,
            libc::SYS_mknodat,
        ];
        for call in forbidden {
            assert!(!ALLOWED.contains(&call) && !ALLOWED_HERE.contains(&call), "{call}");
        }
    }
}
