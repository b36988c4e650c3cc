//! Operations beside the computation: results, order, errors, bounds, and the times that are told.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use pacs_collective::{
    AbortHandle, Collective, CollectiveError, CudaDevice, DeviceBuffer, ErrorKind, GroupConfig, HostCollective,
    HostListener, Lent, overlap,
};
use pacs_types::Generation;

const PATIENT: Duration = Duration::from_secs(60);

#[test]
fn buckets_come_back_with_the_bits_of_the_blocking_operations() {
    for depth in [1, 2, 8] {
        run(3, |mut ring| {
            let rank = ring.rank();
            let value = |i: usize| (pacs_types::mix(((rank as u64) << 32) ^ i as u64) % 1000) as f32 / 7.0;
            let mut expected: Vec<f32> = (0..30_000).map(value).collect();
            let mut buckets = expected.clone();
            expected.chunks_mut(6000).for_each(|bucket| ring.all_reduce_sum(bucket).unwrap());
            let (gathered, times) = overlap(&mut ring, depth, |overlap| {
                // Last layer first, as a backward does.
                let tickets: Vec<_> =
                    buckets.chunks_mut(6000).rev().map(|bucket| overlap.start_all_reduce_sum(bucket)).collect();
                let gathered = overlap.all_gather_f64(&[rank as f64]).unwrap();
                for ticket in tickets.into_iter().rev() {
                    let Lent::Numbers(bucket) = overlap.wait(ticket).unwrap() else { panic!("another kind of memory") };
                    assert_eq!(bucket.len(), 6000);
                }
                gathered
            })
            .unwrap();
            assert_eq!(gathered, [[0.0], [1.0], [2.0]]);
            assert_eq!(times.operations, 6);
            let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            // The chunks are the same ones in either order, so the additions are, too.
            assert!(bits(&buckets) == bits(&expected), "depth {depth}");
        });
    }
}

#[test]
fn both_halves_of_an_all_reduce_work_beside_the_computation() {
    run(2, |mut ring| {
        let rank = ring.rank();
        let (mut numbers, mut bytes) = (vec![1.0 + rank as f32; 8], vec![rank as u8; 8]);
        overlap(&mut ring, 2, |overlap| {
            let reduced = overlap.start_reduce_scatter_sum(&mut numbers);
            let gathered = overlap.start_all_gather(&mut bytes);
            let Lent::Numbers(numbers) = overlap.wait(reduced).unwrap() else { panic!("another kind of memory") };
            assert_eq!(numbers[4 * rank..4 * (rank + 1)], [3.0; 4]);
            let Lent::Bytes(bytes) = overlap.wait(gathered).unwrap() else { panic!("another kind of memory") };
            assert_eq!(bytes, [0, 0, 0, 0, 1, 1, 1, 1]);
        })
        .unwrap();
    });
}

#[test]
fn an_error_surfaces_at_wait_and_stops_what_follows() {
    run(2, |mut ring| {
        if ring.rank() == 1 {
            return;
        }
        let (mut first, mut second) = (vec![1.0; 10], vec![1.0; 10]);
        overlap(&mut ring, 2, |overlap| {
            let (lost, later) = (overlap.start_all_reduce_sum(&mut first), overlap.start_all_reduce_sum(&mut second));
            let lost = overlap.wait(lost).unwrap_err();
            assert!(matches!(lost.kind, ErrorKind::PeerClosed), "{lost}");
            let later = overlap.wait(later).unwrap_err();
            assert!(matches!(later.kind, ErrorKind::Ended { .. }), "{later}");
        })
        .unwrap();
    });
}

#[test]
fn what_nobody_waited_for_is_waited_for_at_the_end() {
    run(2, |mut ring| {
        let mut data = vec![1.0; 10];
        let ((), times) = overlap(&mut ring, 2, |overlap| drop(overlap.start_all_reduce_sum(&mut data))).unwrap();
        assert_eq!((data, times.operations), (vec![2.0; 10], 1));
        if ring.rank() == 0 {
            drop(ring);
            return;
        }
        let mut data = vec![1.0; 10];
        let error = overlap(&mut ring, 2, |overlap| drop(overlap.start_all_reduce_sum(&mut data))).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::PeerClosed), "{error}");
    });
}

#[test]
fn an_abort_ends_what_is_under_way() {
    let (aborts, abort) = mpsc::channel::<AbortHandle>();
    let aborting = thread::spawn(move || abort.recv().unwrap().abort("generation 8 began"));
    let (done, is_done) = mpsc::channel();
    let is_done = std::sync::Mutex::new(is_done);
    run(2, |mut ring| {
        if ring.rank() == 1 {
            // Alive, and never takes part.
            is_done.lock().unwrap().recv_timeout(PATIENT).unwrap();
            return;
        }
        let handle = ring.abort_handle();
        let mut data = vec![1.0; 10];
        overlap(&mut ring, 2, |overlap| {
            let ticket = overlap.start_all_reduce_sum(&mut data);
            aborts.send(handle).unwrap();
            let error = overlap.wait(ticket).unwrap_err();
            assert!(matches!(error.kind, ErrorKind::Aborted { .. }), "{error}");
        })
        .unwrap();
        done.send(()).unwrap();
    });
    aborting.join().unwrap();
}

#[test]
fn a_panic_of_the_caller_does_not_hang() {
    let started = Instant::now();
    run(2, |mut ring| {
        if ring.rank() == 1 {
            return;
        }
        let mut data: Vec<Vec<f32>> = vec![vec![1.0; 10]; 4];
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = overlap(&mut ring, 1, |overlap| {
                for data in &mut data {
                    let _ticket = overlap.start_all_reduce_sum(data);
                }
                panic!("the computation failed");
            });
        }));
        assert!(caught.is_err());
    });
    assert!(started.elapsed() < PATIENT);
}

#[test]
fn times_say_how_much_was_hidden() {
    let work = Duration::from_millis(400);
    let mut data = [[0f32; 4]; 4];
    let ((), hidden) = overlap(&mut Slow, 4, |overlap| {
        let tickets: Vec<_> = data.iter_mut().map(|data| overlap.start_all_reduce_sum(data)).collect();
        // The computation: it is to last longer than the four operations.
        thread::sleep(work);
        tickets.into_iter().for_each(|ticket| drop(overlap.wait(ticket).unwrap()));
    })
    .unwrap();
    assert!(hidden.communicating >= 4 * Slow::TAKES, "{hidden:?}");
    assert!(hidden.hidden_share() > 0.5, "{hidden:?}");
    let mut data = [[0f32; 4]; 4];
    let ((), plain) = overlap(&mut Slow, 4, |overlap| {
        for data in &mut data {
            let ticket = overlap.start_all_reduce_sum(data);
            overlap.wait(ticket).unwrap();
        }
    })
    .unwrap();
    assert!(plain.hidden_share() < 0.5, "{plain:?}");
    // A full queue makes the caller stand still, too.
    let mut data = [[0f32; 4]; 8];
    let ((), full) = overlap(&mut Slow, 1, |overlap| {
        data.iter_mut().for_each(|data| drop(overlap.start_all_reduce_sum(data)));
        assert_eq!(overlap.world_size(), 1);
    })
    .unwrap();
    assert!(full.waited >= 4 * Slow::TAKES, "{full:?}");
}

/// A world of one whose operations take their time.
struct Slow;

impl Slow {
    const TAKES: Duration = Duration::from_millis(20);
}

impl Collective for Slow {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&mut self, _: &mut [f32]) -> Result<(), CollectiveError> {
        thread::sleep(Self::TAKES);
        Ok(())
    }

    fn reduce_scatter_sum(&mut self, _: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_gather(&mut self, _: &mut [u8]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_gather_f64(&mut self, mine: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        Ok(vec![mine.to_vec()])
    }

    fn broadcast(&mut self, _: usize, _: &mut [u8]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new()
    }

    fn device(&self) -> Option<&CudaDevice> {
        None
    }

    fn all_reduce_sum_device(&mut self, _: &DeviceBuffer) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn reduce_scatter_sum_device(&mut self, _: &DeviceBuffer) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn all_gather_device(&mut self, _: &DeviceBuffer) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn broadcast_device(&mut self, _: usize, _: &DeviceBuffer) -> Result<(), CollectiveError> {
        Ok(())
    }
}

fn run(world_size: usize, body: impl Fn(HostCollective) + Sync) {
    let listeners: Vec<HostListener> = (0..world_size).map(|_| HostListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<String> = listeners.iter().map(|listener| listener.address().to_string()).collect();
    let (listeners, addresses, body) = (&listeners, &addresses, &body);
    thread::scope(|scope| {
        for (rank, listener) in listeners.iter().enumerate() {
            scope.spawn(move || {
                let group = GroupConfig {
                    job: "a".to_owned(),
                    generation: Generation(1),
                    rank,
                    addresses: addresses.clone(),
                    timeout: PATIENT,
                };
                body(HostCollective::connect(listener, group).unwrap());
            });
        }
    });
}
