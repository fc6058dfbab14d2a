package s3

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/versity/versitygw/auth"
	"github.com/versity/versitygw/s3err"
)

// EnsureBucket makes a bucket of the configuration's account, if it is not there. Versioning is turned on, never off.
func (a *Admin) EnsureBucket(name string, versioning bool) error {
	//lint:ignore SA1029 the key is versitygw's
	ctx := context.WithValue(context.Background(), "bucket-owner", a.u.root)
	acl, err := json.Marshal(auth.ACL{Owner: a.u.root.Access})
	if err != nil {
		return fmt.Errorf("make bucket %s: %w", name, err)
	}
	err = a.b.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &name, ObjectOwnership: types.ObjectOwnershipBucketOwnerEnforced}, acl)
	if errors.Is(err, s3err.GetBucketErr(s3err.ErrBucketAlreadyOwnedByYou, name)) || errors.Is(err, s3err.GetBucketErr(s3err.ErrBucketAlreadyExists, name)) {
		err = nil
	}
	if err == nil && versioning {
		err = a.b.PutBucketVersioning(ctx, name, types.BucketVersioningStatusEnabled)
	}
	if err != nil {
		return fmt.Errorf("make bucket %s: %w", name, err)
	}
	return nil
}
