//! The TCP ring among threads: results, and what happens when a rank is lost.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use pacs_collective::{
    AbortHandle, Collective, CollectiveError, ErrorKind, GroupConfig, HOST_BANDWIDTH_FLOOR, HostCollective,
    HostListener, Operation,
};
use pacs_types::Generation;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// Long enough that only a hang reaches it.
const PATIENT: Duration = Duration::from_secs(60);
/// What "at once" may take on a busy machine.
const PROMPT: Duration = Duration::from_secs(10);
const SIZES: [usize; 5] = [0, 1, 7, 1000, 1_000_003];

#[test]
fn all_reduce_equals_the_plain_sum() {
    for world_size in 1..=5 {
        // Whole numbers this small add up without rounding, in any order.
        let value = |rank: usize, i: usize| ((i * 31 + rank * 17) % 1013) as f32 - 500.0;
        run(world_size, |mut ring| {
            for size in SIZES {
                let mut data: Vec<f32> = (0..size).map(|i| value(ring.rank(), i)).collect();
                ring.all_reduce_sum(&mut data).unwrap();
                let sum = |i| (0..world_size).map(|rank| value(rank, i)).sum::<f32>();
                let wrong = (0..size).find(|&i| data[i] != sum(i));
                assert_eq!(wrong, None, "{size} numbers over {world_size} ranks");
            }
        });
    }
}

#[test]
fn reduce_scatter_leaves_each_rank_its_part_of_the_sum() {
    for world_size in 1..=4 {
        run(world_size, |mut ring| {
            let rank = ring.rank();
            for part in [0, 1, 7, 1000, 300_001] {
                let value = |rank: usize, i: usize| ((i * 31 + rank * 17) % 1013) as f32 - 500.0;
                let mut data: Vec<f32> = (0..part * world_size).map(|i| value(rank, i)).collect();
                ring.reduce_scatter_sum(&mut data).unwrap();
                let sum = |i| (0..world_size).map(|rank| value(rank, i)).sum::<f32>();
                let wrong = (part * rank..part * (rank + 1)).find(|&i| data[i] != sum(i));
                assert_eq!(wrong, None, "parts of {part} numbers over {world_size} ranks");
            }
        });
    }
}

#[test]
fn all_gather_shares_every_part() {
    for world_size in 1..=4 {
        run(world_size, |mut ring| {
            let rank = ring.rank();
            for part in [0, 1, 7, 1000, 2_000_003] {
                let whole: Vec<u8> = (0..part * world_size).map(|i| (i * 7 + i / 251) as u8).collect();
                let mut data = vec![0xee; whole.len()];
                let mine = part * rank..part * (rank + 1);
                data[mine.clone()].copy_from_slice(&whole[mine]);
                ring.all_gather(&mut data).unwrap();
                assert!(data == whole, "parts of {part} bytes over {world_size} ranks");
            }
        });
    }
}

#[test]
fn all_gather_takes_different_lengths() {
    let block = |rank: usize| (0..rank * 40_000).map(|i| i as f64 / 3.0 - rank as f64).collect::<Vec<f64>>();
    for world_size in 1..=5 {
        run(world_size, |mut ring| {
            for shift in 0..world_size {
                let gathered = ring.all_gather_f64(&block((ring.rank() + shift) % world_size)).unwrap();
                let expected: Vec<_> = (0..world_size).map(|rank| block((rank + shift) % world_size)).collect();
                assert!(gathered == expected, "{world_size} ranks, shift {shift}");
            }
        });
    }
}

#[test]
fn broadcast_reaches_every_rank_from_every_root() {
    for world_size in 1..=4 {
        run(world_size, |mut ring| {
            for (root, size) in (0..world_size).flat_map(|root| SIZES.map(|size| (root, size))) {
                let sent: Vec<u8> = (0..size).map(|i| (i * 7 + root) as u8).collect();
                let mut data = if ring.rank() == root { sent.clone() } else { vec![0xee; size] };
                ring.broadcast(root, &mut data).unwrap();
                assert!(data == sent, "{size} bytes from {root} of {world_size}");
            }
        });
    }
}

#[test]
fn barrier_waits_for_every_rank() {
    let arrived = AtomicUsize::new(0);
    run(4, |mut ring| {
        for round in 1..=50 {
            arrived.fetch_add(1, Ordering::SeqCst);
            ring.barrier().unwrap();
            assert!(arrived.load(Ordering::SeqCst) >= 4 * round);
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_rank_ends_with_the_same_bits(
        world_size in 2usize..6,
        size in 0usize..5000,
        scale in -20i32..20,
        salt in any::<u32>(),
    ) {
        let value = |rank: usize, i: usize| {
            let noise = pacs_types::mix(u64::from(salt) ^ ((rank as u64) << 32) ^ i as u64);
            (noise as f64 / u64::MAX as f64 - 0.5) as f32 * 2f32.powi(scale)
        };
        let input = |rank| (0..size).map(|i| value(rank, i)).collect::<Vec<f32>>();
        let reduce = || run(world_size, |mut ring| {
            let mut data = input(ring.rank());
            ring.all_reduce_sum(&mut data).unwrap();
            data.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
        });
        let results = reduce();
        prop_assert!(results.iter().all(|result| *result == results[0]));
        prop_assert_eq!(&reduce()[0], &results[0], "another run gives the same bits");
        for (i, &bits) in results[0].iter().enumerate() {
            let exact: f64 = (0..world_size).map(|rank| f64::from(value(rank, i))).sum();
            let error = (f64::from(f32::from_bits(bits)) - exact).abs();
            prop_assert!(error <= 1e-6 * 2f64.powi(scale), "{error}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(1), ..ProptestConfig::with_cases(24) })]
    #[test]
    fn the_two_halves_of_an_all_reduce_give_its_bits(world_size in 1usize..5, part in 0usize..400_000, salt: u32) {
        run(world_size, |mut ring| {
            let rank = ring.rank();
            let value = |i: usize| {
                let noise = pacs_types::mix(u64::from(salt) ^ ((rank as u64) << 32) ^ i as u64);
                (noise as f64 / u64::MAX as f64 - 0.5) as f32
            };
            let mut whole: Vec<f32> = (0..part * world_size).map(value).collect();
            let mut halves = whole.clone();
            ring.all_reduce_sum(&mut whole).unwrap();
            ring.reduce_scatter_sum(&mut halves).unwrap();
            ring.all_gather(bytemuck::cast_slice_mut(&mut halves)).unwrap();
            assert!(whole.iter().map(|x| x.to_bits()).eq(halves.iter().map(|x| x.to_bits())));
        });
    }
}

#[test]
fn a_lost_rank_fails_the_others_at_once() {
    let started = Instant::now();
    let (died, deaths) = mpsc::channel();
    let deaths = Mutex::new(deaths);
    run(4, |mut ring| {
        let mut data = vec![1.0; 1_000_003];
        if ring.rank() == 2 {
            ring.all_reduce_sum(&mut data).unwrap();
            drop(ring);
            died.send(()).unwrap();
            return;
        }
        ring.all_reduce_sum(&mut data).unwrap();
        if ring.rank() == 0 {
            // This rank is sure to notice a death that lies before its call.
            deaths.lock().unwrap().recv().unwrap();
        }
        let error = ring.all_reduce_sum(&mut data).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::PeerClosed), "{error}");
        assert_eq!((error.operation, error.rank), (Operation::AllReduceSum, ring.rank()));
        let neighbours = [(ring.rank() + 1) % 4, (ring.rank() + 3) % 4];
        assert!(neighbours.map(Some).contains(&error.peer), "{error}");
        let later = ring.barrier().unwrap_err();
        assert!(matches!(&later.kind, ErrorKind::Ended { first } if *first == error.to_string()), "{later}");
    });
    assert!(started.elapsed() < PROMPT);
}

/// One operation, with rank 1 as the root.
type Run = fn(&mut HostCollective) -> Result<(), CollectiveError>;

/// Every operation, by name.
const OPERATIONS: [(Operation, Run); 6] = [
    (Operation::AllReduceSum, |ring| ring.all_reduce_sum(&mut vec![1.0; 300_000])),
    (Operation::ReduceScatterSum, |ring| ring.reduce_scatter_sum(&mut vec![1.0; 300_000])),
    (Operation::AllGather, |ring| ring.all_gather(&mut vec![1; 600_000])),
    (Operation::AllGatherF64, |ring| ring.all_gather_f64(&vec![1.0; 3000]).map(drop)),
    (Operation::Broadcast, |ring| ring.broadcast(1, &mut vec![1; 600_000])),
    (Operation::Barrier, |ring| ring.barrier()),
];

#[test]
fn every_operation_ends_at_its_deadline() {
    for (operation, call) in OPERATIONS {
        let started = Instant::now();
        let errors = with_silent_rank(Duration::from_millis(300), |ring| call(ring).unwrap_err());
        assert!(started.elapsed() < PROMPT, "{operation}: {:?}", started.elapsed());
        for error in errors {
            assert!(matches!(error.kind, ErrorKind::TimedOut { .. } | ErrorKind::PeerClosed), "{error}");
            assert_eq!(error.operation, operation);
        }
    }
}

#[test]
fn a_large_buffer_has_more_time() {
    let base = Duration::from_millis(100);
    let errors = with_silent_rank(base, |ring| {
        let started = Instant::now();
        let error = ring.all_gather(&mut vec![0; HOST_BANDWIDTH_FLOOR as usize / 300 * 300 / 2]).unwrap_err();
        (started.elapsed(), error)
    });
    let timed_out = errors.iter().find_map(|(elapsed, error)| match &error.kind {
        ErrorKind::TimedOut { timeout, .. } => Some((*elapsed, *timeout)),
        _ => None,
    });
    let (elapsed, timeout) = timed_out.expect("the first rank to give up says why");
    let expected = Duration::from_millis(600);
    assert!(timeout.abs_diff(expected) < Duration::from_millis(1), "{timeout:?}");
    assert!(elapsed >= timeout && elapsed < PROMPT, "{elapsed:?}");
}

#[test]
fn every_operation_can_be_aborted_from_another_thread() {
    for (operation, call) in OPERATIONS {
        let errors = with_silent_rank(PATIENT, |ring| {
            let handle = ring.abort_handle();
            thread::scope(|scope| {
                // Whether it comes before or while the operation waits, the outcome is the same.
                scope.spawn(move || handle.abort("a rank is gone"));
                call(ring).unwrap_err()
            })
        });
        for error in errors {
            // The neighbour's abort may be seen first.
            assert!(matches!(error.kind, ErrorKind::Aborted { .. } | ErrorKind::PeerClosed), "{error}");
            assert_eq!(error.operation, operation);
        }
    }
}

#[test]
fn every_pair_of_different_operations_is_out_of_step() {
    for ((operation, first), (other, second)) in OPERATIONS.into_iter().zip(OPERATIONS.into_iter().cycle().skip(1)) {
        let errors = run(2, |mut ring| if ring.rank() == 0 { first(&mut ring) } else { second(&mut ring) });
        let errors: Vec<_> = errors.into_iter().filter_map(Result::err).collect();
        let named = errors.iter().any(|error| matches!(error.kind, ErrorKind::OutOfStep { .. }));
        assert!(named, "{operation} against {other}: {errors:?}");
    }
}

/// Runs `body` on ranks 0 and 2 of three, while rank 1 is alive and elsewhere until both have ended.
fn with_silent_rank<T: Send>(timeout: Duration, body: impl Fn(&mut HostCollective) -> T + Sync) -> Vec<T> {
    let (done, all_done) = mpsc::channel();
    let all_done = Mutex::new(all_done);
    let results = run_with(3, timeout, |mut ring| {
        if ring.rank() == 1 {
            let all_done = all_done.lock().unwrap();
            (0..2).for_each(|_| all_done.recv_timeout(PATIENT).unwrap());
            return None;
        }
        let result = body(&mut ring);
        done.send(()).unwrap();
        Some(result)
    });
    results.into_iter().flatten().collect()
}

#[test]
fn a_silent_rank_fails_the_others_at_the_deadline() {
    let timeout = Duration::from_millis(400);
    let (done, all_done) = mpsc::channel();
    let all_done = Mutex::new(all_done);
    run_with(3, timeout, |mut ring| {
        if ring.rank() == 1 {
            // Alive, but elsewhere until the others have given up.
            let all_done = all_done.lock().unwrap();
            for _ in 0..2 {
                all_done.recv_timeout(PROMPT).unwrap();
            }
            return;
        }
        let started = Instant::now();
        let error = ring.all_reduce_sum(&mut vec![1.0; 3_000_000]).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::TimedOut { .. } | ErrorKind::PeerClosed), "{error}");
        assert!(started.elapsed() >= timeout / 2 && started.elapsed() < PROMPT, "{:?}", started.elapsed());
        done.send(()).unwrap();
    });
}

#[test]
fn an_abort_ends_a_blocked_operation() {
    let (handles, handle) = mpsc::channel::<AbortHandle>();
    let aborting = thread::spawn(move || {
        let handle = handle.recv().unwrap();
        assert!(!handle.has_ended());
        let at = Instant::now();
        handle.abort("generation 8 began");
        handle.abort("a second reason changes nothing");
        at
    });
    let (done, all_done) = mpsc::channel();
    let all_done = Mutex::new(all_done);
    run(3, |mut ring| {
        let rank = ring.rank();
        if rank == 0 {
            // Never takes part: the others hang until the abort reaches them.
            let all_done = all_done.lock().unwrap();
            for _ in 0..2 {
                all_done.recv_timeout(PROMPT).unwrap();
            }
            return;
        }
        if rank == 1 {
            handles.send(ring.abort_handle()).unwrap();
        }
        let error = ring.all_reduce_sum(&mut vec![1.0; 3_000_000]).unwrap_err();
        match error.kind {
            ErrorKind::Aborted { reason } if rank == 1 => assert_eq!(reason, "generation 8 began"),
            ErrorKind::PeerClosed if rank == 2 => {}
            other => panic!("rank {rank}: {other}"),
        }
        done.send(()).unwrap();
    });
    assert!(aborting.join().unwrap().elapsed() < PROMPT);
}

#[test]
fn an_abort_ends_waiting_for_the_others() {
    let listener = listener();
    let nobody = self::listener();
    let group = group(&[&listener, &nobody], 0, 1, PATIENT);
    let abort = AbortHandle::new();
    let started = Instant::now();
    let error = thread::scope(|scope| {
        let connecting = scope.spawn(|| HostCollective::connect_abortable(&listener, group, abort.clone()));
        abort.abort("no longer needed");
        connecting.join().unwrap().unwrap_err()
    });
    assert!(matches!(error.kind, ErrorKind::Aborted { .. }), "{error}");
    assert_eq!(error.operation, Operation::Connect);
    assert!(started.elapsed() < PROMPT);
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let listener = listener();
    // An address of its own, so that no other test takes the port once it is free.
    let gone = HostListener::bind("127.0.0.2:0").unwrap();
    let timeout = Duration::from_millis(300);
    let group = group(&[&listener, &gone], 0, 1, timeout);
    drop(gone);
    let started = Instant::now();
    let error = HostCollective::connect(&listener, group.clone()).unwrap_err();
    assert!(started.elapsed() >= timeout, "a peer that does not listen yet is tried until the deadline");
    assert_eq!((error.peer, error.rank), (Some(1), 0));
    let named = format!("waiting for the peer at `{}` (Connection refused", group.addresses[1]);
    assert!(error.to_string().contains(&named), "{error}");
}

#[test]
fn a_peer_of_another_generation_is_refused_by_name() {
    let listeners = [listener(), listener()];
    let group = |rank, generation| group(&[&listeners[0], &listeners[1]], rank, generation, PATIENT);
    thread::scope(|scope| {
        let current = scope.spawn(|| HostCollective::connect(&listeners[0], group(0, 5)));
        let stale = HostCollective::connect(&listeners[1], group(1, 4)).unwrap_err();
        assert!(matches!(stale.kind, ErrorKind::Refused { .. }), "{stale}");
        assert!(stale.to_string().contains("of gen-5 of job `a`, not rank 1 of 2 of gen-4"), "{stale}");
        // The refusal did not end the other rank's wait.
        let rejoined = HostCollective::connect(&listeners[1], group(1, 5)).unwrap();
        assert_eq!((rejoined.rank(), current.join().unwrap().unwrap().rank()), (1, 0));
    });
}

#[test]
fn a_peer_that_is_ahead_waits_for_the_others() {
    let listeners = [listener(), listener()];
    let group = |rank, generation| group(&[&listeners[0], &listeners[1]], rank, generation, PATIENT);
    thread::scope(|scope| {
        let ahead = scope.spawn(|| HostCollective::connect(&listeners[1], group(1, 6)));
        let older = HostCollective::connect(&listeners[0], group(0, 5)).unwrap_err();
        assert!(matches!(older.kind, ErrorKind::Refused { .. }), "{older}");
        HostCollective::connect(&listeners[0], group(0, 6)).unwrap();
        // It may find the other rank gone by now; what matters is that it was let in.
        if let Err(error) = ahead.join().unwrap() {
            assert!(matches!(error.kind, ErrorKind::PeerClosed), "{error}");
        }
    });
}

#[test]
fn a_peer_of_another_job_is_refused_by_name() {
    let [waiting, stranger, nobody] = [listener(), listener(), listener()];
    let group = group(&[&waiting, &nobody], 0, 1, PATIENT);
    let strange = GroupConfig { job: "b".to_owned(), ..self::group(&[&waiting, &stranger], 1, 1, PATIENT) };
    let abort = AbortHandle::new();
    thread::scope(|scope| {
        let connecting = scope.spawn(|| HostCollective::connect_abortable(&waiting, group, abort.clone()));
        let error = HostCollective::connect(&stranger, strange).unwrap_err();
        assert!(error.to_string().contains("of job `a`, not rank 1 of 2 of gen-1 of job `b`"), "{error}");
        assert!(!abort.has_ended(), "the refusal did not end the other rank's wait");
        abort.abort("the test is over");
        assert!(matches!(connecting.join().unwrap().unwrap_err().kind, ErrorKind::Aborted { .. }));
    });
}

#[test]
fn connections_that_are_no_rank_do_no_harm() {
    let listeners = [listener(), listener()];
    let mut scanner = TcpStream::connect(listeners[0].address()).unwrap();
    scanner.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let silent = TcpStream::connect(listeners[0].address()).unwrap();
    let started = Instant::now();
    let ranks = connect(&listeners, 1, PATIENT);
    assert!(ranks.iter().all(Result::is_ok), "{ranks:?}");
    assert!(started.elapsed() < PROMPT);
    drop(silent);
}

#[test]
fn listeners_serve_one_generation_after_another() {
    let listeners = [listener(), listener(), listener()];
    for generation in 1..20 {
        for rank in connect(&listeners, generation, PATIENT) {
            // Leaves without a word: the next generation must not mind.
            drop(rank.unwrap());
        }
    }
}

#[test]
fn ranks_that_are_out_of_step_notice() {
    let errors = run(2, |mut ring| match ring.rank() {
        0 => ring.barrier().unwrap_err(),
        _ => ring.all_reduce_sum(&mut [0.0; 10]).unwrap_err(),
    });
    assert_out_of_step(&errors, "barrier of 0 elements");
    let errors = run(2, |mut ring| ring.all_reduce_sum(&mut vec![0.0; 10 + ring.rank()]).unwrap_err());
    assert_out_of_step(&errors, "all_reduce_sum of 11 elements");
    let errors = run(2, |mut ring| ring.reduce_scatter_sum(&mut vec![0.0; 10 + 2 * ring.rank()]).unwrap_err());
    assert_out_of_step(&errors, "reduce_scatter_sum of 12 elements");
    let errors = run(2, |mut ring| ring.all_gather(&mut vec![0; 10 + 2 * ring.rank()]).unwrap_err());
    assert_out_of_step(&errors, "all_gather of 12 elements");
}

fn assert_out_of_step(errors: &[CollectiveError], named: &str) {
    // The slower one may see nothing but the connection that the faster one closed.
    let out_of_step: Vec<_> = errors.iter().filter(|error| matches!(error.kind, ErrorKind::OutOfStep { .. })).collect();
    assert!(!out_of_step.is_empty(), "{errors:?}");
    assert!(out_of_step.iter().all(|error| error.to_string().contains(named)), "{errors:?}");
}

#[test]
fn impossible_requests_are_refused() {
    let listener = listener();
    let lonely = group(&[&listener], 0, 1, PATIENT);
    let misplaced = GroupConfig { rank: 1, ..lonely.clone() };
    let error = HostCollective::connect(&listener, misplaced).unwrap_err();
    assert_eq!(error.to_string(), "connect on rank 1: rank 1 has no address in a group of 1");
    let mut ring: Box<dyn Collective> = Box::new(HostCollective::connect(&listener, lonely).unwrap());
    assert_eq!(ring.all_gather_f64(&[1.5]).unwrap(), [[1.5]]);
    assert!(matches!(ring.broadcast(1, &mut []).unwrap_err().kind, ErrorKind::Invalid(_)));
    assert!(matches!(ring.barrier().unwrap_err().kind, ErrorKind::Ended { .. }), "in a world of one, too");
}

#[test]
fn buffers_that_do_not_fall_into_equal_parts_are_refused() {
    let errors = run(3, |mut ring| ring.reduce_scatter_sum(&mut [0.0; 10]).unwrap_err());
    for (rank, error) in errors.iter().enumerate() {
        let expected = format!("reduce_scatter_sum on rank {rank}: 10 elements do not fall into 3 equal parts");
        assert_eq!(error.to_string(), expected);
    }
    let errors = run(2, |mut ring| ring.all_gather(&mut [0; 3]).unwrap_err());
    assert!(errors.iter().all(|error| matches!(error.kind, ErrorKind::Invalid(_))), "{errors:?}");
}

/// Runs `body` as every rank of a ring and returns what the ranks return, by rank.
fn run<T: Send>(world_size: usize, body: impl Fn(HostCollective) -> T + Sync) -> Vec<T> {
    run_with(world_size, PATIENT, body)
}

fn run_with<T: Send>(world_size: usize, timeout: Duration, body: impl Fn(HostCollective) -> T + Sync) -> Vec<T> {
    let listeners: Vec<HostListener> = (0..world_size).map(|_| listener()).collect();
    let ranks = connect(&listeners, 1, timeout);
    let body = &body;
    thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || body(rank.unwrap()))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn connect(
    listeners: &[HostListener],
    generation: u64,
    timeout: Duration,
) -> Vec<Result<HostCollective, CollectiveError>> {
    let all: Vec<&HostListener> = listeners.iter().collect();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..listeners.len())
            .map(|rank| {
                let group = group(&all, rank, generation, timeout);
                scope.spawn(move || HostCollective::connect(&listeners[rank], group))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn listener() -> HostListener {
    HostListener::bind("127.0.0.1:0").unwrap()
}

fn group(listeners: &[&HostListener], rank: usize, generation: u64, timeout: Duration) -> GroupConfig {
    let addresses = listeners.iter().map(|listener| listener.address().to_string()).collect();
    GroupConfig { job: "a".to_owned(), generation: Generation(generation), rank, addresses, timeout }
}
