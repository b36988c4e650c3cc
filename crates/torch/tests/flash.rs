//! Attention of many sequences in one call, against one sequence at a time in float64.

use std::sync::OnceLock;

use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_torch::{
    FlashSequences, flash_attention, flash_backward, flash_forward, has_flash_attention, with_emulated_flash,
};

/// The same, a sequence at a time.
fn plainly(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &[[usize; 2]], window: Option<usize>) -> Tensor {
    let (mut query, mut key) = (0, 0);
    let parts: Vec<Tensor> = lengths
        .iter()
        .map(|&[queries, keys]| {
            let [queries, keys] = [queries as i64, keys as i64];
            let part = |x: &Tensor, start, rows| x.narrow(0, start, rows).transpose(0, 1).unsqueeze(0);
            let mask = Tensor::ones([queries, keys], (Kind::Bool, q.device())).tril(keys - queries);
            let mask = window.map_or_else(|| mask.copy(), |window| mask.triu(keys - queries - window as i64 + 1));
            let [q, k, v] = [part(q, query, queries), part(k, key, keys), part(v, key, keys)];
            (query, key) = (query + queries, key + keys);
            Tensor::scaled_dot_product_attention(&q, &k, &v, Some(mask), 0.0, false, None::<f64>, true)
                .squeeze_dim(0)
                .transpose(0, 1)
        })
        .collect();
    Tensor::cat(&parts, 0)
}

/// Output and gradients.
fn run(inputs: &[Tensor; 3], attend: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor) -> Vec<Tensor> {
    let [q, k, v] = inputs.each_ref().map(|x| x.detach().set_requires_grad(true));
    let output = attend(&q, &k, &v);
    (&output * output.detach().sin()).sum(Kind::Float).backward();
    vec![output, q.grad(), k.grad(), v.grad()]
}

fn check(device: Device, kind: Kind, tolerance: f64) {
    [None, Some(1), Some(5), Some(1000)].into_iter().for_each(|window| check_window(device, kind, tolerance, window));
}

fn check_window(device: Device, kind: Kind, tolerance: f64, window: Option<usize>) {
    let lengths = [[3, 3], [4, 9], [1, 6], [70, 70], [1, 1]];
    let sequences = FlashSequences::new(&lengths, device);
    let [queries, keys] = sequences.rows();
    let random = |rows, heads| Tensor::randn([rows, heads, 16], (Kind::Float, device)).to_kind(kind);
    let inputs = [random(queries, 6), random(keys, 2), random(keys, 2)];
    assert!(has_flash_attention(device, kind, 16));
    let flash = run(&inputs, |q, k, v| flash_attention(q, k, v, &sequences, window));
    // The backward by itself is that of the graph.
    let output = flash_forward(&inputs[0], &inputs[1], &inputs[2], &sequences, window);
    let by_output = output.output.sin();
    let directly = flash_backward(&by_output, inputs.each_ref(), &output, &sequences);
    for (direct, of_graph) in directly.iter().zip(&flash[1..]) {
        assert!(direct.allclose(of_graph, tolerance, tolerance, false));
    }
    let exact = inputs.each_ref().map(|x| x.to_kind(Kind::Double));
    let expected = run(&exact, |q, k, v| plainly(q, k, v, &lengths, window));
    for (name, (got, expected)) in ["output", "by q", "by k", "by v"].into_iter().zip(flash.iter().zip(&expected)) {
        assert_eq!(got.kind(), kind);
        assert!(got.to_kind(Kind::Double).allclose(expected, tolerance, tolerance, false), "{name}, {window:?}");
    }
}

/// libtorch is asked for CUDA before anything else is asked of it.
fn device() -> Result<Device, String> {
    static DEVICE: OnceLock<Result<Device, String>> = OnceLock::new();
    DEVICE.get_or_init(|| pacs_torch::init(true, 1).map_err(|problem| problem.to_string())).clone()
}

#[test]
fn the_emulated_operator_attends_within_sequences_and_so_do_its_gradients() {
    let _ = device();
    assert!(!has_flash_attention(Device::Cpu, Kind::BFloat16, 16));
    with_emulated_flash(|| check(Device::Cpu, Kind::Float, 1e-5));
    assert!(!has_flash_attention(Device::Cpu, Kind::BFloat16, 16));
}

#[test]
fn so_does_the_operator_of_a_real_device() {
    match device() {
        Ok(device) => check(device, Kind::BFloat16, 4e-2),
        Err(problem) => println!("skipped, for it needs a GPU: {problem}"),
    }
}
