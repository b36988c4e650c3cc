//! Attention of sequences of many lengths in one call: libtorch's flash kernels, which keep no scores and pad nothing.
#![expect(unsafe_code, reason = "operators are called by name")]

mod emulated;

use tch::{Device, Kind, Tensor};

use crate::cuda::{compute_capability, device_kernels};
use crate::dispatch::{Value, call};
use crate::element::is_plain;

pub use emulated::with_emulated_flash;

/// Where sequences begin among the rows of queries and among those of keys.
#[derive(Debug)]
pub struct FlashSequences {
    /// `[S + 1]` int32: the first row of each, and the number of all.
    starts: [Tensor; 2],
    longest: [i64; 2],
    rows: [i64; 2],
}

impl FlashSequences {
    /// Sequences of so many queries and so many keys, one after the other. None is empty, and none has fewer keys than
    /// queries.
    #[must_use]
    pub fn new(lengths: &[[usize; 2]], device: Device) -> Self {
        debug_assert!(lengths.iter().all(|&[queries, keys]| 0 < queries && queries <= keys));
        let side = |side: usize| {
            let mut starts = vec![0_i32];
            let mut sum = 0;
            for length in lengths {
                sum += length[side];
                starts.push(i32::try_from(sum).expect("a pass has fewer than 2^31 tokens"));
            }
            let longest = lengths.iter().map(|length| length[side]).max().unwrap_or(0);
            (Tensor::from_slice(&starts).to_device(device), longest as i64, sum as i64)
        };
        let [(queries, longest_queries, query_rows), (keys, longest_keys, key_rows)] = [side(0), side(1)];
        Self { starts: [queries, keys], longest: [longest_queries, longest_keys], rows: [query_rows, key_rows] }
    }

    /// Rows of queries and of keys.
    #[must_use]
    pub fn rows(&self) -> [i64; 2] {
        self.rows
    }

    fn expect(&self, q: &Tensor, k: &Tensor, v: &Tensor) {
        let [query_rows, key_rows] = self.rows;
        assert!(
            q.dim() == 3 && q.size()[0] == query_rows && k.size()[0] == key_rows && v.size() == k.size(),
            "{query_rows} queries and {key_rows} keys were planned, {:?} and {:?} came",
            q.size(),
            k.size()
        );
    }
}

/// The widest heads that the kernels' backward takes on every GPU they run on.
const WIDEST_HEAD: i64 = 128;

/// Whether [`flash_attention`] computes such tensors: 16-bit ones on a GPU of compute capability 8.0 or later, and not within
/// [`crate::plain`].
#[must_use]
pub fn has_flash_attention(device: Device, kind: Kind, head_dim: i64) -> bool {
    // The kernels of decoding go along with these.
    if is_plain() && device_kernels().is_none() {
        return false;
    }
    let fits = matches!(kind, Kind::Half | Kind::BFloat16) && head_dim % 8 == 0 && head_dim <= WIDEST_HEAD;
    match device {
        Device::Cuda(index) => fits && compute_capability(index).is_ok_and(|[major, _]| major >= 8),
        Device::Cpu => emulated::is_active(),
        _ => false,
    }
}

/// What [`flash_forward`] gives, all of which [`flash_backward`] needs.
#[derive(Debug)]
pub struct FlashOutput {
    /// `[query rows, N, H]`.
    pub output: Tensor,
    /// Log of the sum of the weights of each query.
    sums: Tensor,
    /// Keys that each query saw, itself included; none: all.
    window: Option<usize>,
    /// State of dropout, of which there is none.
    random: [Tensor; 2],
}

/// Attends within each sequence, differentiably; the last query sees all keys of its sequence, each one before one key less. With
/// a `window` each sees the last `window` of those.
///
/// `q`: `[query rows, N, H]`, `k` and `v`: `[key rows, K, H]`, where `N` is a multiple of `K`. Returns `[query rows, N, H]`.
///
/// # Panics
/// When there are other rows than planned, [`has_flash_attention`] says no, or the device fails, as for any operation of it.
pub fn flash_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: &FlashSequences,
    window: Option<usize>,
) -> Tensor {
    flash_forward(q, k, v, sequences, window).output
}

/// The same, with what the backward needs.
///
/// # Panics
/// As [`flash_attention`].
#[must_use]
pub fn flash_forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sequences: &FlashSequences,
    window: Option<usize>,
) -> FlashOutput {
    sequences.expect(q, k, v);
    let [query_starts, key_starts] = &sequences.starts;
    let [longest_query, longest_key] = sequences.longest;
    let arguments = [
        Value::Tensor(q),
        Value::Tensor(k),
        Value::Tensor(v),
        Value::Some(query_starts),
        Value::Some(key_starts),
        Value::Int(longest_query),
        Value::Int(longest_key),
        // No dropout, causal, no scores for debugging.
        Value::Float(0.0),
        Value::Bool(true),
        Value::Bool(false),
        // Scale 1 / sqrt(H).
        Value::None,
        keys_before(window),
        // What comes later is hidden already; all keys used, no bias by distance.
        Value::None,
        Value::None,
        Value::None,
    ];
    // SAFETY: Tensor query, key, value, Tensor? cum_seq_q, cum_seq_k, SymInt max_q, max_k, float dropout_p, bool is_causal,
    // return_debug_mask, *, float? scale, SymInt? window_size_left, window_size_right, Tensor? seqused_k, alibi_slopes
    // -> Tensor output, softmax_logsumexp, rng_state, unused, debug_attn_mask.
    let outputs = unsafe { call::<5>(c"aten::_flash_attention_forward", &arguments) };
    let [output, sums, state, unused, _] = outputs.unwrap_or_else(|error| panic!("{error}"));
    FlashOutput { output, sums, window, random: [state, unused] }
}

/// The window as the operators count it: keys to the left of the query.
fn keys_before(window: Option<usize>) -> Value<'static> {
    window.map_or(Value::None, |window| Value::SomeInt(window as i64 - 1))
}

/// Gradients by queries, keys and values of [`flash_forward`], from that by its output, `[query rows, N, H]`. Without a graph of
/// autograd: what it calls for the operator's gradient is called here.
///
/// # Panics
/// As [`flash_attention`].
pub fn flash_backward(
    by_output: &Tensor,
    [q, k, v]: [&Tensor; 3],
    output: &FlashOutput,
    sequences: &FlashSequences,
) -> [Tensor; 3] {
    sequences.expect(q, k, v);
    let FlashOutput { output, sums, window, random: [state, unused] } = output;
    assert_eq!(by_output.size(), output.size(), "a gradient of another output");
    let tensors = [by_output, q, k, v, output, sums, &sequences.starts[0], &sequences.starts[1]].map(Value::Tensor);
    let [longest_query, longest_key] = sequences.longest;
    let rest = [
        Value::Int(longest_query),
        Value::Int(longest_key),
        // No dropout, causal.
        Value::Float(0.0),
        Value::Bool(true),
        Value::Tensor(state),
        Value::Tensor(unused),
        // Scale 1 / sqrt(H).
        Value::None,
        keys_before(*window),
        Value::None,
    ];
    let arguments = [&tensors[..], &rest].concat();
    // SAFETY: Tensor grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, SymInt max_q, max_k, float dropout_p,
    // bool is_causal, Tensor rng_state, unused, *, float? scale, SymInt? window_size_left, window_size_right
    // -> (Tensor, Tensor, Tensor).
    let gradients = unsafe { call::<3>(c"aten::_flash_attention_backward", &arguments) };
    gradients.unwrap_or_else(|error| panic!("{error}"))
}
