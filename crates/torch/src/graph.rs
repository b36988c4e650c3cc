//! Work of a device that is recorded once and run again by one call: a pass of many small kernels then costs the host one
//! launch.

mod cuda;

use tch::{Device, Tensor};

use self::cuda::{Recorded, Recorder};

/// Why work was not recorded, or does not run again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GraphError {
    /// The device has no graphs.
    #[error("{0:?} has no CUDA graphs")]
    Device(Device),
    /// The CUDA half of libtorch is not the one that this was written for, or one of its streams failed.
    #[error("{0}")]
    Library(String),
    /// A call of CUDA's graphs failed.
    #[error("{0} failed; standard error has what libtorch says of it (`Exception in aoti_torch`)")]
    Call(&'static str),
    /// A recording of this process has failed before.
    #[error("a recording of this process has failed before, and libtorch cannot record again after that")]
    Broken,
    /// The work failed while it was recorded.
    #[error("the work that was to be recorded failed: {0}")]
    Work(String),
}

/// Records work of one device.
#[derive(Debug)]
pub struct Graphs {
    /// Records CUDA graphs; `None` where they are emulated.
    recorder: Option<Recorder>,
}

/// Work that is done anew whenever it is called: it reads tensors that it holds, and nothing else that changes.
type Work = Box<dyn Fn() -> Tensor + Send>;

/// Work that was recorded once and is replayed on the same memory.
pub struct Graph {
    /// The CUDA graph; `None` where the work is repeated instead.
    recorded: Option<Recorded>,
    output: Tensor,
    /// Holds the tensors whose memory the graph reads.
    work: Work,
}

impl Graphs {
    /// For a GPU, which [`crate::init`] has returned.
    ///
    /// # Errors
    /// When `device` is none, or its libtorch lacks what is needed.
    pub fn new(device: Device) -> Result<Self, GraphError> {
        let Device::Cuda(index) = device else { return Err(GraphError::Device(device)) };
        Ok(Self { recorder: Some(Recorder::new(index)?) })
    }

    /// For a processor, which does the work again instead: for checks.
    #[must_use]
    pub fn emulated() -> Self {
        Self { recorder: None }
    }

    /// Records `work`, which is done once before: it must bear being repeated, keep to the device (no wait for it, no copy to
    /// or from the host), and read what changes from tensors that it holds. All graphs of `self` share memory for what lies
    /// between: one at a time, on one thread.
    ///
    /// # Errors
    /// When the device or the work fails; what was recorded before is as it was. After the device refused a recording, all
    /// later ones of the process are refused, too.
    pub fn record(&mut self, work: impl Fn() -> Tensor + Send + 'static) -> Result<Graph, GraphError> {
        let work: Work = Box::new(work);
        let (recorded, output) = match &mut self.recorder {
            Some(recorder) => {
                let (recorded, output) = recorder.record(&work)?;
                (Some(recorded), output)
            }
            None => (None, work()),
        };
        Ok(Graph { recorded, output, work })
    }
}

impl Graph {
    /// Does the work again. What it gives lies in the same place every time.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn replay(&mut self) -> Result<&Tensor, GraphError> {
        match &mut self.recorded {
            Some(recorded) => recorded.replay()?,
            None => self.output.copy_(&(self.work)()),
        }
        Ok(&self.output)
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").field("recorded", &self.recorded).field("output", &self.output).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn repeated_work_reads_what_was_written_since() {
        assert_eq!(Graphs::new(Device::Cpu).err(), Some(GraphError::Device(Device::Cpu)));
        let mut input = Tensor::from_slice(&[1.0f32, 2.0]);
        let held = input.shallow_clone();
        let mut graph = Graphs::emulated().record(move || &held * 2.0).expect("records");
        let place = graph.output.data_ptr();
        for value in [3.0, 5.0] {
            let _ = input.fill_(value);
            let output = graph.replay().expect("runs");
            assert_eq!((output.double_value(&[1]), output.data_ptr()), (2.0 * value, place));
        }
    }

    /// The GPU of this machine; says so where there is none.
    fn gpu() -> Option<Device> {
        let found = crate::testing::gpu();
        if let Err(error) = found {
            assert!(Graphs::new(Device::Cuda(0)).is_err(), "there is no GPU");
            eprintln!("skipped: {error}");
        }
        found.as_ref().ok().copied()
    }

    /// Products, whose library takes memory of its own, and small kernels. Then what cannot be recorded: last, for nothing is
    /// recorded in this process after that.
    #[test]
    fn a_real_device_does_recorded_work_again_until_one_recording_fails() {
        let Some(device) = gpu() else { return };
        work_is_done_again(device);
        what_cannot_be_recorded_is_an_error_and_does_no_harm(device);
    }

    fn work_is_done_again(device: Device) {
        let weight = Tensor::randn([64, 64], (Kind::BFloat16, device));
        let mut input = Tensor::zeros([16, 64], (Kind::BFloat16, device));
        let [held, by] = [&input, &weight].map(Tensor::shallow_clone);
        let mut graphs = Graphs::new(device).expect("a GPU has graphs");
        let mut graph = graphs.record(move || held.matmul(&by).silu()).expect("records");
        for _ in 0..3 {
            let new = Tensor::randn([16, 64], (Kind::BFloat16, device));
            input.copy_(&new);
            assert!(graph.replay().expect("runs").allclose(&new.matmul(&weight).silu(), 1e-2, 1e-2, false));
        }
    }

    fn what_cannot_be_recorded_is_an_error_and_does_no_harm(device: Device) {
        let mut graphs = Graphs::new(device).expect("a GPU has graphs");
        let input = Tensor::zeros([16], (Kind::Float, device));
        let held = input.shallow_clone();
        let refused = graphs.record(move || Tensor::from(held.sum(Kind::Float).double_value(&[])));
        assert!(matches!(refused, Err(GraphError::Call(_) | GraphError::Work(_))), "{refused:?}");
        let held = input.shallow_clone();
        let later = graphs.record(move || &held + 1.0);
        assert!(matches!(later, Err(GraphError::Broken)), "{later:?}");
        // Work that is not recorded is unaffected.
        assert_eq!((&input + 1.0).sum(Kind::Float).double_value(&[]), 16.0);
    }
}
