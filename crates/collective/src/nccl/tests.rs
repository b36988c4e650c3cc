//! Order of calls, failures, and freed resources, with a fake library; and all operations with a real one where there
//! is a device.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pacs_types::Generation;

use super::api::{DeviceError, Pointer, Stream, Versions};
use super::device::CudaDevice;
use super::fake::Fake;
use super::{DeviceBuffer, NcclCollective};
use crate::{
    AbortHandle, Collective, CollectiveError, ErrorKind, GroupConfig, HostCollective, HostListener, Operation,
};

const PATIENT: Duration = Duration::from_secs(60);

/// One operation on device memory.
type Run = fn(&mut NcclCollective, &DeviceBuffer) -> Result<(), CollectiveError>;
const OPERATIONS: [(Operation, Run); 4] = [
    (Operation::AllReduceSum, |nccl, data| nccl.all_reduce_sum_device(data)),
    (Operation::ReduceScatterSum, |nccl, data| nccl.reduce_scatter_sum_device(data)),
    (Operation::AllGather, |nccl, data| nccl.all_gather_device(data)),
    (Operation::Broadcast, |nccl, data| nccl.broadcast_device(0, data)),
];

#[test]
fn an_operation_waits_for_its_owner_and_is_marked_when_it_is_in_the_stream() {
    let fake = Fake::new().shared();
    let device = CudaDevice::with(fake.clone());
    let mut nccl = NcclCollective::alone(&device).unwrap();
    let mut memory = device.allocate(64).unwrap();
    memory.lend(|data| nccl.all_reduce_sum_device(data)).unwrap().unwrap();
    drop(nccl);
    let pointer = 4096 * 4;
    let launch = format!("AllReduceSum {{ data: Pointer({pointer}), numbers: 16 }}");
    let expected = [
        "begin 0 of 1 with [1, 2, 3]",
        "record theirs",
        "wait for theirs",
        &launch,
        "record ours",
        "finalize",
        "destroy",
    ];
    assert_eq!(fake.log(), expected);
    drop(memory);
    assert_eq!(fake.live(), 0, "everything is given back");
}

#[test]
fn parts_lie_where_they_belong() {
    let fakes = [Fake::new().shared(), Fake::new().shared()];
    pair(&fakes, PATIENT, |rank, device, mut nccl| {
        let mut memory = device.allocate(64).unwrap();
        for (_, run) in OPERATIONS {
            memory.lend(|data| run(&mut nccl, data)).unwrap().unwrap();
        }
        let log = fakes[rank].log().join("\n");
        for launch in [
            "numbers: 16",
            &format!("part: 8, rank: {rank}"),
            &format!("part: 32, rank: {rank}"),
            "bytes: 64, root: 0",
            &format!("begin {rank} of 2 with [1, 2, 3]"),
        ] {
            assert!(log.contains(launch), "{launch} in\n{log}");
        }
    });
}

#[test]
fn odd_lengths_are_refused_before_the_device_sees_them() {
    for (bytes, run) in [(62, OPERATIONS[0].1), (36, OPERATIONS[1].1), (33, OPERATIONS[2].1)] {
        let fakes = [Fake::new().shared(), Fake::new().shared()];
        pair(&fakes, PATIENT, |rank, device, mut nccl| {
            let error = device.allocate(bytes).unwrap().lend(|data| run(&mut nccl, data)).unwrap().unwrap_err();
            assert!(matches!(error.kind, ErrorKind::Invalid(_)), "{error}");
            drop(nccl);
            assert!(!fakes[rank].log().iter().any(|call| call.contains("Sum") || call.contains("Gather")));
        });
    }
}

#[test]
fn every_operation_ends_at_its_deadline_and_is_aborted() {
    for (operation, run) in OPERATIONS {
        // Settles at the first poll, so that the short deadline applies to operations only.
        let fake = Fake { hangs_at: Some(0), settles_after: 0, ..Fake::new() }.shared();
        let device = CudaDevice::with(fake.clone());
        let mut nccl = alone(&device, Duration::from_millis(100));
        let error = device.allocate(64).unwrap().lend(|data| run(&mut nccl, data)).unwrap().unwrap_err();
        assert!(matches!(error.kind, ErrorKind::TimedOut { .. }), "{error}");
        assert_eq!(error.operation, operation);
        let later = device.allocate(64).unwrap().lend(|data| run(&mut nccl, data)).unwrap().unwrap_err();
        assert!(matches!(later.kind, ErrorKind::Ended { .. }), "{later}");
        assert!(matches!(nccl.barrier().unwrap_err().kind, ErrorKind::Ended { .. }), "the ring ended with it");
        drop(nccl);
        assert_eq!(fake.log().iter().filter(|call| *call == "abort").count(), 1, "{:?}", fake.log());
        assert!(!fake.log().contains(&"finalize".to_owned()), "the memory comes back only after the abort");
        assert_eq!(fake.live(), 0);
    }
}

#[test]
fn an_abort_from_another_thread_ends_an_operation() {
    let fake = Fake { hangs_at: Some(0), ..Fake::new() }.shared();
    let device = CudaDevice::with(fake.clone());
    let mut nccl = alone(&device, PATIENT);
    let handle = nccl.abort_handle();
    let mut memory = device.allocate(64).unwrap();
    let started = Instant::now();
    let error = thread::scope(|scope| {
        let watched = Arc::clone(&fake);
        scope.spawn(move || {
            while !watched.log().iter().any(|call| call.starts_with("AllReduce")) && started.elapsed() < PATIENT {
                thread::yield_now();
            }
            handle.abort("generation 8 began");
        });
        memory.lend(|data| nccl.all_reduce_sum_device(data)).unwrap().unwrap_err()
    });
    assert_eq!(error.to_string(), "all_reduce_sum on rank 0: aborted: generation 8 began");
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(fake.log().contains(&"abort".to_owned()));
}

#[test]
fn a_process_whose_abort_hangs_must_exit() {
    let patience = Duration::from_millis(50);
    for (takes, leaves) in [(Duration::ZERO, 0), (Duration::from_secs(2), 1)] {
        let fake = Fake { breaks_at: Some(0), abort_takes: takes, ..Fake::new() }.shared();
        let device = CudaDevice::with(fake.clone());
        let allowed = if leaves == 0 { PATIENT } else { patience };
        let mut nccl = alone(&device, PATIENT).with_patience(allowed);
        device.allocate(64).unwrap().lend(|data| nccl.all_reduce_sum_device(data)).unwrap().unwrap_err();
        let left: Vec<String> = fake.log().into_iter().filter(|call| call.starts_with("leave")).collect();
        assert_eq!(left.len(), leaves, "{left:?}");
        assert!(left.iter().all(|call| call.ends_with("ncclCommAbort did not come back within 50ms")), "{left:?}");
    }
}

#[test]
fn an_error_of_nccl_is_passed_on() {
    let fake = Fake { breaks_at: Some(0), ..Fake::new() }.shared();
    let device = CudaDevice::with(fake.clone());
    let mut nccl = alone(&device, PATIENT);
    let error = device.allocate(64).unwrap().lend(|data| nccl.all_reduce_sum_device(data)).unwrap().unwrap_err();
    assert_eq!(error.to_string(), "all_reduce_sum on rank 0: NCCL: remote process exited (code 6)");
    assert!(fake.log().contains(&"abort".to_owned()));
}

#[test]
fn a_lost_rank_ends_an_operation_long_before_its_deadline() {
    // The remaining rank hangs on its device, as NCCL does when a peer dies; the other rank leaves.
    let fakes = [Fake { hangs_at: Some(0), ..Fake::new() }.shared(), Fake::new().shared()];
    let started = Instant::now();
    pair(&fakes, PATIENT, |rank, device, mut nccl| {
        if rank == 1 {
            return;
        }
        let error = device.allocate(64).unwrap().lend(|data| nccl.all_reduce_sum_device(data)).unwrap().unwrap_err();
        assert!(matches!(error.kind, ErrorKind::PeerClosed), "{error}");
        assert_eq!(error.peer, Some(1));
    });
    assert!(started.elapsed() < Duration::from_secs(20));
    assert!(fakes[0].log().contains(&"abort".to_owned()));
}

#[test]
fn a_mixture_of_versions_is_refused_by_name() {
    let old = Fake { versions: Versions { nccl: 22703, cuda: 13000 }, ..Fake::new() };
    let errors = try_pair(&[Fake::new().shared(), old.shared()], PATIENT, |_, _, _| ());
    let messages: Vec<String> = errors.into_iter().map(|result| result.unwrap_err().to_string()).collect();
    let expected = "connect on rank 0: rank 1 has NCCL 2.27.3 and CUDA 13.0, this rank NCCL 2.28.9 and CUDA 13.0; give \
                    every rank the same image or environment";
    assert!(messages.contains(&expected.to_owned()), "{messages:?}");
}

#[test]
fn host_memory_travels_over_the_ring() {
    pair(&[Fake::new().shared(), Fake::new().shared()], PATIENT, |rank, _, mut nccl| {
        let mut data = [1.0 + rank as f32; 4];
        nccl.all_reduce_sum(&mut data).unwrap();
        assert_eq!(data, [3.0; 4]);
        assert_eq!(nccl.all_gather_f64(&[rank as f64]).unwrap(), [[0.0], [1.0]]);
    });
}

#[test]
fn the_host_backend_refuses_the_memory_of_devices() {
    let device = CudaDevice::with(Fake::new().shared());
    let mut ring = HostCollective::alone();
    let error = device.allocate(64).unwrap().lend(|data| ring.all_reduce_sum_device(data)).unwrap().unwrap_err();
    assert!(error.to_string().contains("cannot reach the memory of a device"), "{error}");
}

/// Every operation at world size 1 on a real device, and an abort while one is queued.
#[test]
fn a_real_device_does_all_of_it() {
    let device = match CudaDevice::open(0) {
        Ok(device) => device,
        Err(error @ (DeviceError::NoDriver | DeviceError::NoNccl { .. } | DeviceError::NoDevice { .. })) => {
            eprintln!("SKIPPED: the NCCL backend on a device: {error}");
            return;
        }
        // A driver without a device reports that at `cuInit`.
        Err(error @ DeviceError::Call { call: "cuInit", .. }) => {
            eprintln!("SKIPPED: the NCCL backend on a device: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let mut nccl = NcclCollective::alone(&device).unwrap();
    let numbers: Vec<f32> = (0..1 << 20).map(|i| i as f32).collect();
    for (operation, run) in OPERATIONS {
        let mut memory = device.allocate(size_of_val(&numbers[..])).unwrap();
        memory.upload(bytemuck::cast_slice(&numbers)).unwrap();
        memory.lend(|data| run(&mut nccl, data)).unwrap().unwrap();
        let mut back = vec![0f32; numbers.len()];
        memory.download(bytemuck::cast_slice_mut(&mut back)).unwrap();
        assert!(back == numbers, "{operation} among one rank changes nothing");
    }
    nccl.barrier().unwrap();
    // The operation waits in the stream for about a second of copies when another thread aborts.
    let mut memory = device.allocate(1 << 30).unwrap();
    let (api, scratch) = (device.api(), device.allocate(1 << 30).unwrap());
    let half = 1 << 29;
    for _ in 0..2000 {
        let to = Pointer(scratch.pointer().0 + half);
        api.copy(scratch.pointer(), to, half as usize, Stream(0)).unwrap();
    }
    let handle = nccl.abort_handle();
    let error = thread::scope(|scope| {
        scope.spawn(move || {
            // Part of the time that the copies take; nothing is waited for.
            thread::sleep(Duration::from_millis(50));
            handle.abort("the test says so");
        });
        memory.lend(|data| nccl.all_reduce_sum_device(data)).unwrap().unwrap_err()
    });
    assert!(matches!(error.kind, ErrorKind::Aborted { .. }), "{error}");
    drop(nccl);
    // The device is still usable.
    let mut nccl = NcclCollective::alone(&device).unwrap();
    memory.lend(|data| nccl.all_reduce_sum_device(data)).unwrap().unwrap();
}

fn alone(device: &CudaDevice, timeout: Duration) -> NcclCollective {
    let listener = HostListener::bind("127.0.0.1:0").unwrap();
    NcclCollective::connect(&listener, group(&[&listener], 0, timeout), AbortHandle::new(), device).unwrap()
}

/// Runs two ranks, each with a library of its own.
fn pair(fakes: &[Arc<Fake>; 2], timeout: Duration, body: impl Fn(usize, &CudaDevice, NcclCollective) + Sync) {
    try_pair(fakes, timeout, body).into_iter().for_each(Result::unwrap);
}

fn try_pair(
    fakes: &[Arc<Fake>; 2],
    timeout: Duration,
    body: impl Fn(usize, &CudaDevice, NcclCollective) + Sync,
) -> Vec<Result<(), CollectiveError>> {
    let listeners = [0, 1].map(|_| HostListener::bind("127.0.0.1:0").unwrap());
    let (listeners, body) = (&listeners, &body);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|rank| {
                let device = CudaDevice::with(fakes[rank].clone());
                scope.spawn(move || {
                    let group = group(&[&listeners[0], &listeners[1]], rank, timeout);
                    let ring = HostCollective::connect(&listeners[rank], group)?;
                    body(rank, &device, NcclCollective::form(ring, &device)?);
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn group(listeners: &[&HostListener], rank: usize, timeout: Duration) -> GroupConfig {
    let addresses = listeners.iter().map(|listener| listener.address().to_string()).collect();
    GroupConfig { job: "a".to_owned(), generation: Generation(1), rank, addresses, timeout }
}
