//! One function; its other side is tests/unit/services/worker_model/safetensors_oracle_test.cc.

use std::panic::{catch_unwind, set_hook};
use std::slice;

/// 1 if the crate accepts these bytes as a whole file, 0 if it refuses them.
///
/// # Safety
/// `size` bytes can be read at `data`, which is not null.
#[no_mangle]
pub unsafe extern "C" fn safetensors_accepts(data: *const u8, size: usize) -> i32 {
    let file = unsafe { slice::from_raw_parts(data, size) };
    set_hook(Box::new(|_| {})); // a panic is an answer here: nothing to print
    matches!(catch_unwind(|| safetensors::SafeTensors::deserialize(file).is_ok()), Ok(true)).into()
}
