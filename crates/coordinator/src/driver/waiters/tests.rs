use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use tokio::task::JoinHandle;

use super::*;

/// Available pieces of work, and the number of tries to take one.
#[derive(Debug, Default)]
struct Work {
    left: usize,
    tries: usize,
    /// Unfinished calls, and whether each can take what there is.
    calls: BTreeMap<u64, bool>,
}

type Shared = Arc<Mutex<Work>>;

fn lock(work: &Shared) -> MutexGuard<'_, Work> {
    work.lock().unwrap()
}

/// Starts a call that takes one piece, if it is able to.
fn call(work: &Shared, waiters: &Waiters, id: u64, able: bool) -> JoinHandle<Option<()>> {
    let (work, waiters) = (Arc::clone(work), waiters.clone());
    lock(&work).calls.insert(id, able);
    tokio::spawn(async move {
        let attempt = |work: &mut Work| {
            work.tries += 1;
            let takes = able && work.left > 0;
            work.left -= usize::from(takes);
            Ok::<_, ()>(takes.then_some(()))
        };
        let deadline = Instant::now() + Duration::from_secs(3600);
        let wait = Wait::Groups(WorkerId(id));
        let found =
            waiters.poll(wait, deadline, || Ok(work.lock().unwrap()), |work| work.left > 0, attempt).await.unwrap();
        lock(&work).calls.remove(&id);
        found
    })
}

/// Pieces left, and number of tries.
fn counts(work: &Shared) -> (usize, usize) {
    let work = lock(work);
    (work.left, work.tries)
}

fn offer(work: &Shared, waiters: &Waiters, units: usize) {
    let mut work = lock(work);
    work.left += units;
    waiters.offer(Line::Groups, units);
}

/// Lets every task run until all are asleep.
async fn settle(tasks: usize) {
    for _ in 0..4 * tasks + 8 {
        tokio::task::yield_now().await;
    }
}

#[derive(Clone, Debug)]
enum Act {
    /// A call begins; one that is not able finds nothing that fits.
    Call { able: bool },
    /// This many pieces of work arrive.
    Offer(usize),
    /// The connection of a call breaks.
    Cancel(usize),
    /// Work arrives and a call breaks before any task has run.
    OfferAndCancel(usize, usize),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => prop::bool::weighted(0.8).prop_map(|able| Act::Call { able }),
        3 => (1usize..4).prop_map(Act::Offer),
        1 => any::<usize>().prop_map(Act::Cancel),
        2 => (1usize..4, any::<usize>()).prop_map(|(units, which)| Act::OfferAndCancel(units, which)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Work is never left while a call waits that could take it, whichever calls were woken in vain or broke.
    #[test]
    fn no_work_is_left_while_a_worker_waits(acts in prop::collection::vec(act(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let (work, waiters) = (Shared::default(), Waiters::default());
            let mut tasks: Vec<(u64, JoinHandle<_>)> = Vec::new();
            for (id, act) in (0u64..).zip(acts) {
                let cancel = |tasks: &mut Vec<(u64, JoinHandle<_>)>, which: usize| {
                    if !tasks.is_empty() {
                        let (id, task) = tasks.remove(which % tasks.len());
                        task.abort();
                        lock(&work).calls.remove(&id);
                    }
                };
                match act {
                    Act::Call { able } => tasks.push((id, call(&work, &waiters, id, able))),
                    Act::Offer(units) => offer(&work, &waiters, units),
                    Act::Cancel(which) => cancel(&mut tasks, which),
                    Act::OfferAndCancel(units, which) => {
                        offer(&work, &waiters, units);
                        cancel(&mut tasks, which);
                    }
                }
                settle(tasks.len()).await;
                tasks.retain(|(_, task)| !task.is_finished());
                let work = lock(&work);
                let could = work.calls.values().any(|able| *able);
                assert!(work.left == 0 || !could, "{work:?} after {id} acts");
            }
        });
    }
}

#[tokio::test]
async fn new_work_wakes_no_more_calls_than_there_are_pieces() {
    let (work, waiters) = (Shared::default(), Waiters::default());
    let tasks: Vec<_> = (0..1000).map(|id| call(&work, &waiters, id, true)).collect();
    settle(1000).await;
    assert_eq!(lock(&work).tries, 1000, "each has tried once");
    for units in [1, 3, 8] {
        let before = lock(&work).tries;
        offer(&work, &waiters, units);
        settle(1000).await;
        let work = lock(&work);
        assert_eq!((work.tries - before, work.left), (units, 0));
    }
    let done: Vec<usize> = tasks.iter().enumerate().filter(|(_, task)| task.is_finished()).map(|(i, _)| i).collect();
    assert_eq!(done, (0..12).collect::<Vec<_>>(), "in the order in which they came");
}

#[tokio::test]
async fn a_call_that_cannot_take_it_keeps_its_place_and_passes_the_turn() {
    let (work, waiters) = (Shared::default(), Waiters::default());
    let picky = call(&work, &waiters, 0, false);
    let others: Vec<_> = (1..4).map(|id| call(&work, &waiters, id, true)).collect();
    settle(4).await;
    offer(&work, &waiters, 1);
    settle(4).await;
    assert!(!picky.is_finished() && others[0].is_finished() && !others[1].is_finished());
    // No remaining call can take the third piece: each tries once, and then all are asleep.
    let before = lock(&work).tries;
    offer(&work, &waiters, 3);
    settle(8).await;
    assert_eq!(counts(&work), (1, before + 3));
    waiters.wake_worker(WorkerId(0));
    settle(8).await;
    assert_eq!(lock(&work).tries - before, 4, "its own state may have changed");
}

#[tokio::test]
async fn a_call_ends_at_its_deadline_and_leaves_the_line() {
    let (waiters, work) = (Waiters::default(), Mutex::new(()));
    let deadline = Instant::now() + Duration::from_millis(20);
    let found = waiters
        .poll(Wait::Task, deadline, || Ok(work.lock().unwrap()), |()| false, |()| Ok::<Option<()>, ()>(None))
        .await;
    assert_eq!(found, Ok(None));
    assert!(Instant::now() >= deadline);
    let lines = waiters.lock();
    assert!(lines.task.ready.is_empty() && lines.task.tried.is_empty() && lines.of_worker.is_empty());
}

/// With many threads and calls that break at any moment, all offered work is taken.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_lost_between_threads() {
    const PIECES: usize = 20_000;
    let (work, waiters) = (Shared::default(), Waiters::default());
    let taken = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let workers: Vec<_> = (0..64u64)
        .map(|id| {
            let (work, waiters, taken) = (Arc::clone(&work), waiters.clone(), Arc::clone(&taken));
            tokio::spawn(async move {
                for round in 0.. {
                    let mut call = call(&work, &waiters, id, true);
                    // Every fifth call is cancelled soon, in whatever state it is.
                    let patience = if round % 5 == 4 { Duration::from_micros(id) } else { Duration::from_secs(60) };
                    match tokio::time::timeout(patience, &mut call).await {
                        Ok(found) => assert_eq!(found.unwrap(), Some(()), "the deadline is far"),
                        Err(_) => {
                            call.abort();
                            // It may have taken a piece before it was cancelled.
                            if !matches!(call.await, Ok(Some(()))) {
                                continue;
                            }
                        }
                    }
                    taken.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            })
        })
        .collect();
    for piece in 0..PIECES {
        offer(&work, &waiters, 1);
        if piece % 16 == 0 {
            tokio::task::yield_now().await;
        }
    }
    let all = async {
        while taken.load(std::sync::atomic::Ordering::Relaxed) < PIECES {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let done = tokio::time::timeout(Duration::from_secs(60), all).await;
    assert!(done.is_ok(), "{} of {PIECES} taken, {:?}", taken.load(std::sync::atomic::Ordering::Relaxed), lock(&work));
    workers.iter().for_each(JoinHandle::abort);
}
