//! The operators of flash attention on a processor, slowly: so that everything around them can be checked where no GPU is.

use std::cell::Cell;
use std::ffi::CStr;
use std::ptr;
use std::sync::Once;

use tch::{Kind, Tensor};

use crate::dispatch::{Kernel, from_word, into_word, library};
use crate::element::with_flag;

thread_local! {
    static ACTIVE: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is within [`with_emulated_flash`].
pub(super) fn is_active() -> bool {
    ACTIVE.get()
}

/// Does `work` with flash attention on the processor: on this thread [`super::has_flash_attention`] says yes for host
/// memory meanwhile.
pub fn with_emulated_flash<T>(work: impl FnOnce() -> T) -> T {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(register);
    with_flag(&ACTIVE, work)
}

/// Registers the kernels for tensors in host memory, for as long as the process lives.
fn register() {
    let mut host = ptr::null_mut();
    // SAFETY: the texts end with a zero byte, the pointer is to a local, and the kernels take the words of their operators.
    unsafe {
        let place = c"flash/emulated.rs";
        let made =
            library::aoti_torch_library_init_impl(c"aten".as_ptr(), c"CPU".as_ptr(), place.as_ptr(), 1, &mut host);
        assert_eq!(made, 0, "libtorch takes no kernels for host memory");
        let kernels: [(&CStr, Kernel); 2] =
            [(c"_flash_attention_forward", forward), (c"_flash_attention_backward", backward)];
        for (name, kernel) in kernels {
            assert_eq!(
                library::aoti_torch_library_impl(host, name.as_ptr(), kernel),
                0,
                "libtorch does not take {name:?}"
            );
        }
    }
}

/// The arguments of a kernel, taken one by one.
struct Stack<'a> {
    words: &'a mut [u64],
    next: usize,
}

impl Stack<'_> {
    fn word(&mut self) -> u64 {
        self.next += 1;
        self.words[self.next - 1]
    }

    fn tensor(&mut self) -> Tensor {
        // SAFETY: the schema has a tensor here, which is the kernel's.
        unsafe { from_word(self.word()) }
    }

    /// A `Tensor?` that must be there.
    fn some(&mut self) -> Tensor {
        let place: *mut u64 = ptr::with_exposed_provenance_mut(self.word() as usize);
        assert!(!place.is_null(), "without starts the operator works on one batch of equal lengths");
        // SAFETY: the word of an optional points to a word that is the kernel's.
        unsafe {
            let tensor = from_word(place.read());
            library::operator_delete(place.cast());
            tensor
        }
    }

    /// The next argument of the type `int?`.
    fn int(&mut self) -> Option<i64> {
        let place: *mut u64 = ptr::with_exposed_provenance_mut(self.word() as usize);
        if place.is_null() {
            return None;
        }
        // SAFETY: the word of an optional points to a word that is the kernel's.
        unsafe {
            let value = place.read().cast_signed();
            library::operator_delete(place.cast());
            Some(value)
        }
    }

    fn none(&mut self, names: &[&str]) {
        for name in names {
            assert_eq!(self.word(), 0, "{name} is not emulated");
        }
    }

    /// Share of dropout, and whether the mask is causal.
    fn is_plainly_causal(&mut self) {
        assert_eq!(f64::from_bits(self.word()), 0.0, "dropout is not emulated");
        assert_eq!(self.word() & 1, 1, "only causal attention is emulated");
    }

    fn give<const OUTPUTS: usize>(self, outputs: [Tensor; OUTPUTS]) {
        assert!(OUTPUTS <= self.words.len());
        for (word, output) in self.words.iter_mut().zip(outputs) {
            *word = into_word(output);
        }
    }
}

/// Rows of queries and of keys of a sequence.
struct Sequence {
    queries: [i64; 2],
    keys: [i64; 2],
}

fn sequences(query_starts: &Tensor, key_starts: &Tensor, longest: [i64; 2]) -> Vec<Sequence> {
    let starts = |starts: &Tensor| {
        assert_eq!(starts.kind(), Kind::Int, "starts are int32");
        (0..starts.size()[0]).map(|i| starts.int64_value(&[i])).collect::<Vec<_>>()
    };
    let queries = starts(query_starts);
    let keys = starts(key_starts);
    assert_eq!(queries.len(), keys.len());
    let found: Vec<_> = queries
        .windows(2)
        .zip(keys.windows(2))
        .map(|(q, k)| Sequence { queries: [q[0], q[1] - q[0]], keys: [k[0], k[1] - k[0]] })
        .collect();
    for sequence in &found {
        assert!(sequence.queries[1] <= longest[0] && sequence.keys[1] <= longest[1], "one is longer than the longest");
    }
    found
}

/// Rows of a sequence as `[heads, rows, H]` float32, every head as often as `repeats` says.
fn part(x: &Tensor, [start, rows]: [i64; 2], repeats: i64) -> Tensor {
    x.narrow(0, start, rows).to_kind(Kind::Float).repeat_interleave_self_int(repeats, 1, None).transpose(0, 1)
}

/// Scores of a sequence, `[N, Q, S]`, where a query sees `before` keys before its own, or all.
fn scores(q: &Tensor, k: &Tensor, before: Option<i64>) -> Tensor {
    let queries = q.size()[1];
    let keys = k.size()[1];
    let all = || Tensor::ones([queries, keys], (Kind::Bool, q.device()));
    let own = keys - queries;
    let later = all().triu(own + 1);
    let hidden = before.map_or_else(|| later.shallow_clone(), |before| later.logical_or(&all().tril(own - before - 1)));
    let scale = (q.size()[2] as f64).powf(-0.5);
    (q.matmul(&k.transpose(1, 2)) * scale).masked_fill(&hidden, f64::NEG_INFINITY)
}

unsafe extern "C-unwind" fn forward(stack: *mut u64, inputs: u64, outputs: u64) {
    let words = inputs.max(outputs) as usize;
    // SAFETY: libtorch's stack has room for inputs and outputs.
    let mut stack = Stack { words: unsafe { std::slice::from_raw_parts_mut(stack, words) }, next: 0 };
    let [q, k, v] = [(); 3].map(|()| stack.tensor());
    let starts = [stack.some(), stack.some()];
    let longest = [stack.word().cast_signed(), stack.word().cast_signed()];
    stack.is_plainly_causal();
    assert_eq!(stack.word() & 1, 0, "the mask of dropout is not emulated");
    stack.none(&["a scale"]);
    let before = stack.int();
    stack.none(&["a window to the right", "a count of keys", "a bias"]);
    let group = q.size()[1] / k.size()[1];
    let output = q.empty_like();
    let sums = Tensor::empty([q.size()[1], q.size()[0]], (Kind::Float, q.device()));
    for Sequence { queries, keys } in sequences(&starts[0], &starts[1], longest) {
        let scores = scores(&part(&q, queries, 1), &part(&k, keys, group), before);
        let attended = scores.softmax(-1, Kind::Float).matmul(&part(&v, keys, group));
        output.narrow(0, queries[0], queries[1]).copy_(&attended.transpose(0, 1));
        sums.narrow(1, queries[0], queries[1]).copy_(&scores.logsumexp(-1, false));
    }
    let nothing = || Tensor::zeros([2], (Kind::Int64, q.device()));
    stack.give([output, sums, nothing(), nothing(), nothing()]);
}

unsafe extern "C-unwind" fn backward(stack: *mut u64, inputs: u64, outputs: u64) {
    let words = inputs.max(outputs) as usize;
    // SAFETY: as in `forward`.
    let mut stack = Stack { words: unsafe { std::slice::from_raw_parts_mut(stack, words) }, next: 0 };
    let [by_output, q, k, v, output, sums, query_starts, key_starts] = [(); 8].map(|()| stack.tensor());
    let longest = [stack.word().cast_signed(), stack.word().cast_signed()];
    stack.is_plainly_causal();
    let _random = [stack.tensor(), stack.tensor()];
    stack.none(&["a scale"]);
    let before = stack.int();
    stack.none(&["a window to the right"]);
    let kv_heads = k.size()[1];
    let head_dim = k.size()[2];
    let group = q.size()[1] / kv_heads;
    let scale = (head_dim as f64).powf(-0.5);
    let [by_q, by_k, by_v] = [&q, &k, &v].map(Tensor::empty_like);
    for Sequence { queries, keys } in sequences(&query_starts, &key_starts, longest) {
        let [by_output, q, output] = [&by_output, &q, &output].map(|x| part(x, queries, 1));
        let [k, v] = [&k, &v].map(|x| part(x, keys, group));
        let weights = (scores(&q, &k, before) - sums.narrow(1, queries[0], queries[1]).unsqueeze(-1)).exp();
        let inner = (&by_output * &output).sum_dim_intlist(-1, true, Kind::Float);
        let by_scores = &weights * (by_output.matmul(&v.transpose(1, 2)) - inner) * scale;
        // Gradients of the query heads of a group belong to their one key head.
        let of_group = |x: Tensor| {
            x.view([kv_heads, group, keys[1], head_dim]).sum_dim_intlist(1, false, Kind::Float).transpose(0, 1)
        };
        by_q.narrow(0, queries[0], queries[1]).copy_(&by_scores.matmul(&k).transpose(0, 1));
        by_k.narrow(0, keys[0], keys[1]).copy_(&of_group(by_scores.transpose(1, 2).matmul(&q)));
        by_v.narrow(0, keys[0], keys[1]).copy_(&of_group(weights.transpose(1, 2).matmul(&by_output)));
    }
    stack.give([by_q, by_k, by_v]);
}
