//! Setting libtorch up more than once in one process, as a worker does that joins a run again.

use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_torch::{DeviceError, init};

#[test]
fn a_process_is_set_up_once() {
    assert_eq!(init(false, 2).expect("the CPU"), Device::Cpu);
    let sum = Tensor::ones([1000], (Kind::Float, Device::Cpu)).sum(Kind::Float);
    assert_eq!(sum.double_value(&[]), 1000.0);
    assert_eq!(init(false, 2).expect("the same again"), Device::Cpu);
    let otherwise = init(false, 3);
    assert!(matches!(otherwise, Err(DeviceError::SetUp { .. })), "{otherwise:?}");
}
