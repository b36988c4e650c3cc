//! Work spread over the threads that libtorch computes with.
//!
//! libtorch's OpenMP threads spin for a while after each operation. Threads of our own would compete with them for the
//! cores; the same pool does both.

use std::ffi::{c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Entry point of the GNU OpenMP runtime: runs a function on a team of threads, the caller among them, and waits.
type GompParallel =
    unsafe extern "C" fn(work: unsafe extern "C" fn(*mut c_void), data: *mut c_void, threads: c_uint, flags: c_uint);

/// Threads that libtorch computes with.
pub(crate) fn threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}

/// Does `work` on every item, on as many threads as there are items at most; results are in the order of the items.
pub(crate) fn map<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    if items.len() < 2 {
        return items.into_iter().map(work).collect();
    }
    let most = items.len().min(threads());
    on_team(most, items, work)
}

/// Does `work` on every item within a team of threads, also where one item is all there is: what `work` calls computes with
/// the thread that calls it, for libtorch and its libraries start no team within another.
pub(crate) fn map_within<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let most = match threads() {
        // There is no other thread that it could compute with.
        1 => 1,
        most => items.len().min(most).max(2),
    };
    on_team(most, items, work)
}

fn on_team<T: Send, R: Send>(threads: usize, items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let cells: Vec<Mutex<(Option<T>, Option<R>)>> =
        items.into_iter().map(|item| Mutex::new((Some(item), None))).collect();
    let next = AtomicUsize::new(0);
    team(threads, &|| {
        while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut cell = cell.lock().unwrap_or_else(PoisonError::into_inner);
            cell.1 = cell.0.take().map(&work);
        }
    });
    let result = |cell: Mutex<(Option<T>, Option<R>)>| {
        cell.into_inner().unwrap_or_else(PoisonError::into_inner).1.expect("every item was worked on")
    };
    cells.into_iter().map(result).collect()
}

/// Runs `work` on a team of `threads` threads at once.
fn team(threads: usize, work: &(dyn Fn() + Sync)) {
    if threads < 2 {
        return work();
    }
    let Some(parallel) = gomp() else {
        return std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
    };
    /// A panic cannot leave here: unwinding out of an `extern "C"` function ends the process.
    unsafe extern "C" fn call(data: *mut c_void) {
        // SAFETY: `data` is the reference below, which outlives the team.
        let work = unsafe { *data.cast::<&(dyn Fn() + Sync)>() };
        work();
    }
    let mut work = work;
    // SAFETY: the function has this signature in every version of the runtime; it returns when all threads are done.
    unsafe { parallel(call, (&raw mut work).cast(), threads as c_uint, 0) }
}

/// The runtime that libtorch brought into the process, when it is GNU's.
fn gomp() -> Option<GompParallel> {
    static FOUND: OnceLock<Option<GompParallel>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // SAFETY: dlsym is called with a valid string; a symbol of this name is that function.
        unsafe {
            let symbol = libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr());
            (!symbol.is_null()).then(|| std::mem::transmute::<*mut c_void, GompParallel>(symbol))
        }
    })
}

/// Length of the parts that a buffer of `length` elements is cut into, one a thread, but none below `smallest`: handing
/// out less costs more than it saves.
pub(crate) fn part_length(length: usize, smallest: usize) -> usize {
    length.div_ceil(threads()).max(smallest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_on_once_and_in_place() {
        for count in [0, 1, 2, 7, 1000] {
            let doubled = map((0..count).collect(), |item: usize| item * 2);
            assert!(doubled.iter().enumerate().all(|(place, value)| *value == 2 * place) && doubled.len() == count);
        }
    }
}
